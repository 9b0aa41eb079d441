// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// socketBody is content of known length on a client's socket.
type socketBody struct {
	io.Reader
	socket *net.TCPConn
	h1.Body
}

func (b *socketBody) Read(p []byte) (int, error) { return b.Reader.Read(p) }
func (b *socketBody) Socket() *net.TCPConn       { return b.socket }

func (b *socketBody) Move(fill func(most int64) (int, error)) (int, error) {
	n, err := fill(b.Remaining)
	if b.Skip(n) {
		err = io.EOF
	}
	return n, err
}

// A body that has arrived and that the origin's socket has room for is sent without a goroutine. What
// is left of another one is sent by the goroutine.
func TestSpliceArrived(t *testing.T) {
	const size = 60 << 10
	for _, row := range []struct {
		name    string
		arrived int64 // before the sending begins
		full    bool  // the origin's socket has no room
	}{
		{"all has arrived", size, false},
		{"nothing has arrived", 0, false},
		{"a part has arrived", 10 << 10, false},
		{"the origin has no room", size, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			from, client := conntest.Pair(t)
			to, origin := conntest.Pair(t)
			before := int64(0) // bytes that fill the origin's socket
			if row.full {
				_ = to.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
				before, _ = io.Copy(struct{ io.Writer }{to}, conntest.Bulk(2, 1<<30))
				_ = to.SetWriteDeadline(time.Time{})
			}
			content := conntest.Bulk(1, size)
			if _, err := io.CopyN(client, content, row.arrived); err != nil {
				t.Fatal(err)
			}
			reader := &socketBody{Reader: from, socket: from.(*net.TCPConn), Body: h1.Body{Remaining: size}}
			body := &RequestBody{Reader: reader, Length: size, Count: func(int64) {}}
			conn := newPooledConn(to, "origin.test:80")
			s := newBodySender(conn, newBodyReader(&Request{Body: body}, &conn.clock, nil))
			done := s.spliceArrived()
			if want := row.arrived == size && !row.full; done != want {
				t.Fatalf("sent without a goroutine: %t, want %t", done, want)
			}
			if !done {
				go s.run()
				s.proceed(true)
			}
			if _, err := io.Copy(client, content); err != nil {
				t.Fatal(err)
			}
			if _, err := io.CopyN(io.Discard, origin, before); err != nil {
				t.Fatal(err)
			}
			conntest.ReceiveBulk(t, "the origin", io.LimitReader(origin, size), 1, size)
			if <-s.sent; !s.complete {
				t.Error("the body was not sent completely")
			}
		})
	}
}
