// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// socketContent is content that comes from a socket.
type socketContent struct {
	socket *net.TCPConn
	left   int64
}

func (c *socketContent) Socket() *net.TCPConn { return c.socket }

func (c *socketContent) Move(fill func(most int64) (int, error)) (int, error) {
	n, err := fill(c.left)
	if c.left -= int64(n); c.left == 0 {
		err = io.EOF
	}
	return n, err
}

// spliced is how a call of Writer.Splice has ended.
type spliced struct {
	moved, written    int64
	readErr, writeErr error
}

// spliceResponse has a Writer splice content of the given size, from the socket whose other end is
// origin, into a response to a request from client. prepare is called before.
func spliceResponse(t *testing.T, method string, size int64, prepare func(w *Writer, src *socketContent)) (origin, client *net.TCPConn, result chan spliced) {
	t.Helper()
	from, origin := tcpPair(t)
	near, client := tcpPair(t)
	result = make(chan spliced, 1)
	l := unitListener(func(out http.ResponseWriter, _ *http.Request) {
		w, src, s := out.(*Writer), &socketContent{from, size}, spliced{}
		w.Header()["Content-Length"] = []string{strconv.FormatInt(size, 10)}
		prepare(w, src)
		w.WriteHeader(http.StatusOK)
		s.readErr, s.writeErr = w.Splice(src, src.left, func(n int64) { s.moved += n })
		if s.written = w.Written(); errors.Is(s.readErr, errors.ErrUnsupported) {
			_, _ = io.CopyN(w, from, src.left)
		}
		result <- s
	})
	l.server.OnPanic = func(_ string, value any, _ []byte) { t.Error(value) }
	_, _ = io.WriteString(client, method+" http://a.example/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	l.serveConn(near, true)
	return origin, client, result
}

// Splice moves all of the content, and counts it exactly. Where it cannot, it moves nothing.
func TestWriterSplices(t *testing.T) {
	t.Parallel()
	const size = 3 << 20
	for name, row := range map[string]struct {
		method  string
		prepare func(w *Writer, src *socketContent)
		want    error
	}{
		"all content": {http.MethodGet, func(*Writer, *socketContent) {}, io.EOF},
		"after a part": {http.MethodGet, func(w *Writer, src *socketContent) {
			part := make([]byte, 1000)
			_, _ = io.ReadFull(src.socket, part)
			_, _ = w.Write(part)
			src.left -= int64(len(part))
		}, io.EOF},
		"to HEAD":          {http.MethodHead, func(*Writer, *socketContent) {}, errors.ErrUnsupported},
		"without a length": {http.MethodGet, func(w *Writer, _ *socketContent) { delete(w.Header(), "Content-Length") }, errors.ErrUnsupported},
		"where splice is refused": {http.MethodGet, func(*Writer, *socketContent) {
			if err := conntest.RefuseSplice(unix.EPERM); err != nil {
				t.Error(err)
			}
		}, errors.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			origin, client, result := spliceResponse(t, row.method, size, row.prepare)
			go conntest.SendBulk(t, "the origin", origin, 1, size)
			res, err := http.ReadResponse(bufio.NewReader(client), &http.Request{Method: row.method})
			if err != nil {
				t.Fatal(err)
			}
			if row.method == http.MethodGet {
				conntest.ReceiveBulk(t, "the client", res.Body, 1, size)
			}
			got, moved := <-result, int64(0)
			if row.want == io.EOF {
				moved = size
			}
			if name == "after a part" {
				moved -= 1000
			}
			if got.readErr != row.want || got.writeErr != nil || got.moved != moved || moved > 0 && got.written != size {
				t.Errorf("Splice: %+v, want %d bytes moved and %v", got, moved, row.want)
			}
		})
	}
}

// Splice tells errors of the origin from those of the client.
func TestWriterSpliceFails(t *testing.T) {
	t.Parallel()
	const size = 64 << 20
	t.Run("at the origin", func(t *testing.T) {
		origin, client, result := spliceResponse(t, http.MethodGet, size, func(*Writer, *socketContent) {})
		_, _ = origin.Write(make([]byte, 1000))
		res, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err == nil {
			_, err = io.ReadFull(res.Body, make([]byte, 1000))
		}
		if err != nil {
			t.Fatal(err)
		}
		_ = origin.SetLinger(0)
		_ = origin.Close()
		if got := <-result; !errors.Is(got.readErr, syscall.ECONNRESET) || got.writeErr != nil || got.moved != 1000 || got.written != 1000 {
			t.Errorf("Splice: %+v", got)
		}
		if n, err := io.Copy(io.Discard, res.Body); n > 0 || err != io.ErrUnexpectedEOF {
			t.Errorf("%d more bytes, %v", n, err)
		}
	})
	t.Run("at the client", func(t *testing.T) {
		origin, client, result := spliceResponse(t, http.MethodGet, size, func(*Writer, *socketContent) {})
		go func() { _, _ = origin.Write(make([]byte, size)) }()
		_, _ = io.ReadFull(client, make([]byte, 1000))
		_ = client.SetLinger(0)
		_ = client.Close()
		if got := <-result; got.readErr != nil || got.writeErr == nil || got.moved != got.written || got.moved >= size {
			t.Errorf("Splice: %+v", got)
		}
	})
}
