// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"io"
	"net"
	"net/http"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// ResponseBody is the body of a response from an HTTP/1 origin.
type ResponseBody struct {
	h1.Body
	response http.Response // that it is the content of
	conn     *pooledConn   // that the body is read from
	sender   *bodySender   // of the request body; nil: there is none

	limits *Limits // for waits; nil: none
	client client.Key
	wait   *contentWait // nil: it has not waited yet
}

// Socket implements tcpconn.Mover.
func (b *ResponseBody) Socket() *net.TCPConn {
	socket, _ := b.conn.Conn.(*net.TCPConn)
	if b.IsChunked() || b.Remaining < 0 || b.R.Buffered() > 0 {
		return nil
	}
	return socket
}

// Move implements tcpconn.Mover. It waits for the bytes as AwaitContent does.
func (b *ResponseBody) Move(fill func(most int64) (int, error)) (n int, err error) {
	err = b.WaitFor(func() (err error) {
		n, err = fill(b.Remaining)
		return err
	})
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if b.Skip(n) {
		err = io.EOF
	}
	return n, err
}

// Read implements io.Reader. If the end of the connection is the end of the body, and the sender of
// the request body has seen a reset, the body counts as cut off.
func (b *ResponseBody) Read(p []byte) (n int, err error) {
	wasEnded := b.Ended
	n, err = b.Body.Read(p)
	if err == io.EOF && !wasEnded && b.Remaining < 0 && !b.IsChunked() && b.sender != nil && b.sender.wasReset() {
		b.Ended = false
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Close implements io.Closer. It does not close the connection.
func (b *ResponseBody) Close() error {
	if b.wait != nil {
		b.wait.end()
		b.wait = nil
	}
	return nil
}
