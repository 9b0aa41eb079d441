// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package origin is the server behind the proxies: HTTP/1.1 with prepared answers, and a
// target for tunnels, on one port of the loopback interface.
package origin

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/wire"
)

// Origin is a server. Close must be called.
type Origin struct {
	listener net.Listener
	received atomic.Int64
	serving  sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool // nil after Close
}

// Listen starts an origin on an address with a port, such as 127.0.0.1:0. The address must
// be on the loopback interface.
func Listen(address string) (*Origin, error) {
	if _, err := wire.Loopback(address); err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	o := &Origin{listener: listener, conns: make(map[net.Conn]bool)}
	o.serving.Go(o.accept)
	return o, nil
}

// Address returns the address and port.
func (o *Origin) Address() string { return o.listener.Addr().String() }

// Received returns how many bytes uploads have brought. Those that were not what the load
// maker sends do not count.
func (o *Origin) Received() int64 { return o.received.Load() }

// Close closes all connections and waits until nothing of the origin runs.
func (o *Origin) Close() {
	o.listener.Close()
	o.mu.Lock()
	for conn := range o.conns {
		conn.Close()
	}
	o.conns = nil
	o.mu.Unlock()
	o.serving.Wait()
}

func (o *Origin) accept() {
	for {
		conn, err := o.listener.Accept()
		if err != nil {
			return
		}
		o.mu.Lock()
		if o.conns == nil {
			conn.Close()
		} else {
			o.conns[conn] = true
			o.serving.Go(func() { o.serve(conn) })
		}
		o.mu.Unlock()
	}
}

// serve serves a connection. Its first byte says whether it comes through a tunnel.
func (o *Origin) serve(conn net.Conn) {
	defer func() {
		conn.Close()
		o.mu.Lock()
		delete(o.conns, conn)
		o.mu.Unlock()
	}()
	buf := make([]byte, 16<<10)
	n, err := conn.Read(buf)
	if err != nil {
		return
	}
	switch first := buf[:n]; first[0] {
	case wire.Echo:
		echo(conn, first[1:])
	case wire.Download:
		send(conn)
	case wire.Upload:
		o.receive(conn, first[1:])
	default:
		serveHTTP(&connection{Conn: conn, buf: buf, unread: first})
	}
}

func echo(conn net.Conn, first []byte) {
	if _, err := conn.Write(first); err == nil {
		// The type hides that conn is a socket: splicing would take two more descriptors.
		_, _ = io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{conn}, make([]byte, 512))
	}
}

var endless = wire.Content(wire.Whole(256 << 10))

func send(conn net.Conn) {
	for {
		if _, err := conn.Write(endless); err != nil {
			return
		}
	}
}

func (o *Origin) receive(conn net.Conn, part []byte) {
	buf := make([]byte, 256<<10)
	var at int64
	for {
		if !wire.Same(part, at) {
			return
		}
		at += int64(len(part))
		o.received.Add(int64(len(part)))
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		part = buf[:n]
	}
}

// connection is an HTTP connection.
type connection struct {
	net.Conn
	buf    []byte
	unread []byte
}

// request is what the origin wants to know of a request.
type request struct {
	path   string
	length int
	closes bool
}

func serveHTTP(c *connection) {
	for {
		r, err := c.request()
		if err == io.EOF {
			return
		}
		answer, known := answers[r.path]
		switch {
		case err != nil:
			answer = failure(err)
		case !known:
			answer = failure(fmt.Errorf("no content at %.40q", r.path))
		}
		if _, writeErr := c.Write(answer); writeErr != nil || err != nil || r.closes {
			return
		}
	}
}

// answers are the answers by path. The path is the length of the content.
var answers = func() map[string][]byte {
	prepared := make(map[string][]byte)
	for _, length := range []int{128, 10 << 10, 1 << 20} {
		head := fmt.Sprintf("HTTP/1.1 200 OK\r\nServer: origin\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n"+
			"Content-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n", length)
		prepared["/"+strconv.Itoa(length)] = append([]byte(head), wire.Content(length)...)
	}
	return prepared
}()

func failure(err error) []byte {
	return fmt.Appendf(nil, "HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(err.Error()), err)
}

// request reads a request with its content. The error is io.EOF if there is none.
func (c *connection) request() (request, error) {
	var end int
	for {
		if end = bytes.Index(c.unread, []byte("\r\n\r\n")); end >= 0 {
			break
		}
		if len(c.unread) == len(c.buf) {
			return request{}, fmt.Errorf("the head is too long")
		}
		if err := c.more(); err != nil {
			return request{}, io.EOF
		}
	}
	r, err := parse(c.unread[:end+2])
	c.unread = c.unread[end+4:]
	if err != nil {
		return r, err
	}
	return r, c.content(r.length)
}

// more reads at least one byte. What was unread stays unread.
func (c *connection) more() error {
	kept := copy(c.buf, c.unread)
	n, err := c.Read(c.buf[kept:])
	c.unread = c.buf[:kept+n]
	if n > 0 {
		return nil
	}
	return err
}

// contents is as long as the longest content that the origin accepts.
var contents = wire.Content(1 << 20)

// content reads the content of a request and checks it.
func (c *connection) content(length int) error {
	for at := 0; at < length; {
		if len(c.unread) == 0 {
			if err := c.more(); err != nil {
				return io.EOF
			}
		}
		part := c.unread[:min(len(c.unread), length-at)]
		if at+len(part) > len(contents) || !bytes.Equal(part, contents[at:at+len(part)]) {
			return fmt.Errorf("wrong content after %d bytes", at)
		}
		at += len(part)
		c.unread = c.unread[len(part):]
	}
	return nil
}

// pathOf returns the path of a request target. Some proxies send the whole URL.
func pathOf(target string) string {
	if rest, found := strings.CutPrefix(target, "http://"); found {
		_, path, _ := strings.Cut(rest, "/")
		return "/" + path
	}
	return target
}

// parse parses the head of a request, which ends with the end of its last line.
func parse(head []byte) (request, error) {
	line, fields, _ := bytes.Cut(head, []byte("\r\n"))
	parts := bytes.Split(line, []byte(" "))
	if len(parts) != 3 {
		return request{}, fmt.Errorf("not a request: %.40q", line)
	}
	r := request{path: pathOf(string(parts[1])), closes: string(parts[2]) == "HTTP/1.0"}
	for len(fields) > 0 {
		line, fields, _ = bytes.Cut(fields, []byte("\r\n"))
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("Content-Length")):
			length, err := strconv.ParseUint(string(value), 10, 31)
			if err != nil {
				return r, fmt.Errorf("Content-Length %q", value)
			}
			r.length = int(length)
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			return r, fmt.Errorf("Transfer-Encoding %q", value)
		case bytes.EqualFold(name, []byte("Connection")):
			if bytes.EqualFold(value, []byte("close")) {
				r.closes = true
			} else if bytes.EqualFold(value, []byte("keep-alive")) {
				r.closes = false
			}
		}
	}
	return r, nil
}
