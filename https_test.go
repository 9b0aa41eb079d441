// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
)

// framesOrigin is an https origin's connection, for tests that spell out every frame.
type framesOrigin struct {
	*http2.Framer
	conn net.Conn
}

// headers sends a response head that fits into one frame, and ends the stream if ends is
// set.
func (f *framesOrigin) headers(stream uint32, ends bool, fields ...string) {
	var head bytes.Buffer
	e := hpack.NewEncoder(&head)
	for i := 0; i < len(fields); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: head.Bytes(), EndHeaders: true, EndStream: ends})
}

// longHeaders is headers for a head that needs several frames.
func (f *framesOrigin) longHeaders(stream uint32, ends bool, fields ...string) {
	var head bytes.Buffer
	e := hpack.NewEncoder(&head)
	for i := 0; i < len(fields); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	const size = 16 << 10
	block := head.Next(size)
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block, EndHeaders: head.Len() == 0, EndStream: ends})
	for head.Len() > 0 {
		block = head.Next(size)
		_ = f.WriteContinuation(stream, head.Len() == 0, block)
	}
}

// newFramesOrigin starts an https origin that calls answer with each request's stream, and
// returns its address. It never enlarges the client's window for content.
func newFramesOrigin(t *testing.T, answer func(f *framesOrigin, stream uint32)) string {
	config := &tls.Config{Certificates: []tls.Certificate{tlsCertificate}, NextProtos: []string{"h2"}}
	return listen(t, func(c *net.TCPConn) {
		conn := tls.Server(c, config)
		if _, err := io.CopyN(io.Discard, conn, int64(len(http2.ClientPreface))); err != nil {
			return
		}
		f := &framesOrigin{http2.NewFramer(conn, conn), conn}
		f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		_ = f.WriteSettings()
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				return
			}
			switch frame := frame.(type) {
			case *http2.SettingsFrame:
				if !frame.IsAck() {
					_ = f.WriteSettingsAck()
				}
			case *http2.PingFrame:
				if !frame.IsAck() {
					_ = f.WritePing(true, frame.Data)
				}
			case *http2.MetaHeadersFrame:
				answer(f, frame.StreamID)
			}
		}
	})
}

// responsesObserved returns how many response times were measured.
func responsesObserved() (n int64) {
	for _, count := range program.metrics.Read().ResponseSeconds.Counts {
		n += count
	}
	return n
}

// TestHTTP2EarlyResponse checks that a response sent before the request is complete reaches
// the client at once.
func TestHTTP2EarlyResponse(t *testing.T) {
	for _, length := range []string{"2", ""} {
		origin := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
			fields := []string{":status", "413", "content-length", length}
			if length == "" {
				fields = fields[:2]
			}
			f.headers(stream, false, fields...)
			_ = f.WriteData(stream, true, []byte("no"))
		})
		for _, framing := range []string{"Content-Length: 5000\n\nabc", "Transfer-Encoding: chunked\n\n3\nabc\n"} {
			c := newWorld(t, "", nil).dial()
			c.send("PUT https://" + origin + "/ HTTP/1.1\nHost: x\n" + framing)
			if res, body := c.response(http.MethodPut); res.StatusCode != http.StatusRequestEntityTooLarge || body != "no" {
				t.Errorf("%s %q", res.Status, body)
			}
		}
	}
}

// A response with conflicting lengths is not passed on. A status without content may still
// carry a length (RFC 9110 §8.6, RFC 9113 §8.1.1).
func TestHTTP2Lengths(t *testing.T) {
	for _, row := range []struct {
		fields, data string
		ends         bool // the head ends the stream
		status       int
		length, body string
	}{
		{":status 200 content-length 2", "ok", false, 200, "2", "ok"},
		{":status 200 content-length 2 content-length 2", "ok", false, 200, "2", "ok"},
		{":status 200 content-length 2 content-length 3", "ok", false, 502, "", ""},
		{":status 200 content-length 2,3", "ok", false, 502, "", ""},
		{":status 200 content-length +2", "ok", false, 502, "", ""},
		{":status 304 content-length 5", "", false, 304, "5", ""},
		{":status 304 content-length 5", "", true, 304, "5", ""},
		{":status 204", "", false, 204, "", ""},
	} {
		origin := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
			f.headers(stream, row.ends, strings.Fields(row.fields)...)
			if !row.ends {
				_ = f.WriteData(stream, true, []byte(row.data))
			}
		})
		c := newWorld(t, "", nil).dial()
		before := responsesObserved()
		for range 2 { // on one connection
			c.send("GET https://" + origin + "/ HTTP/1.1\nHost: x\n\n")
			res, body := c.response(http.MethodGet)
			if length := res.Header.Get("Content-Length"); res.StatusCode != row.status || row.status != 502 && (body != row.body || length != row.length && row.status != 304) {
				t.Errorf("%s: %s, length %q, %q", row.fields, res.Status, length, body)
			}
		}
		measured := int64(2)
		if row.status == http.StatusBadGateway { // not a valid response, so not measured
			measured = 0
		}
		if n := responsesObserved() - before; n != measured {
			t.Errorf("%s: %d responses were measured, want %d", row.fields, n, measured)
		}
	}
}

// The response-header timeout covers the origin's time alone: a client may send its request
// slowly, but an origin that stops reading it, or does not respond to it, times out.
func TestHTTP2ResponseTimeout(t *testing.T) {
	w := newWorld(t, "response_header_timeout 500ms", nil)
	before := responsesObserved()
	silent := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {})
	refusing := newFramesOrigin(t, func(f *framesOrigin, stream uint32) { _ = f.WriteRSTStream(stream, http2.ErrCodeRefusedStream) })
	clients := map[string]*rawConn{}
	for request, origin := range map[string]string{
		"GET https://ORIGIN/silent HTTP/1.1\nHost: x\n\n":                               silent,
		"GET https://ORIGIN/refusing HTTP/1.1\nHost: x\n\n":                             refusing,
		"PUT https://ORIGIN/full HTTP/1.1\nHost: x\nContent-Length: 1000000\n\nCONTENT": silent,
	} {
		c := w.dial()
		clients[request] = c
		sent := strings.ReplaceAll(request, "ORIGIN", origin)
		go func() { // the origin does not read all of it
			_, _ = io.WriteString(c, strings.ReplaceAll(strings.Replace(sent, "CONTENT", strings.Repeat("x", 1_000_000), 1), "\n", "\r\n"))
		}()
	}
	for request, c := range clients {
		if res, body := c.response(http.MethodGet); res.StatusCode != http.StatusGatewayTimeout {
			t.Errorf("%.40q: %s %q", request, res.Status, body)
		}
	}
	if n := responsesObserved() - before; n != 0 {
		t.Errorf("%d responses were measured", n)
	}
	patient := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				return
			}
			if data, ok := frame.(*http2.DataFrame); ok && data.StreamEnded() {
				f.headers(stream, true, ":status", "200")
				return
			}
		}
	})
	c := w.dial()
	c.send("PUT https://" + patient + "/ HTTP/1.1\nHost: x\nContent-Length: 6\n\n")
	for range 6 {
		time.Sleep(150 * time.Millisecond)
		c.send("x")
	}
	if res, body := c.response(http.MethodPut); res.StatusCode != http.StatusOK {
		t.Errorf("a slow client: %s %q", res.Status, body)
	}
}

// A request that may be retried does not fail because the origin was closing an idle
// connection.
func TestHTTP2StaleConnection(t *testing.T) {
	for method, want := range map[string]int{"GET": 200, "DELETE": 200, "POST": 502, "PATCH": 502} {
		var requests atomic.Int64
		origin := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
			if requests.Add(1) == 2 {
				_ = f.conn.Close()
				return
			}
			f.headers(stream, true, ":status", "200")
		})
		c := newWorld(t, "", nil).dial()
		for i, want := range []int{200, want} {
			c.send(fmt.Sprintf("%s https://%s/ HTTP/1.1\nHost: x\n\n", method, origin))
			if res, body := c.response(method); res.StatusCode != want {
				t.Errorf("%s, request %d: %s %q, want %d", method, i, res.Status, body, want)
			}
		}
	}
}

// If an origin has fallen silent on a connection, a request that may be retried is sent on
// another. The dead connection is never reused.
func TestHTTP2SilentConnection(t *testing.T) {
	for method, want := range map[string]int{"GET": 200, "DELETE": 200, "POST": 504} {
		var conns atomic.Int64
		server := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
			f.headers(stream, true, ":status", "200")
			if conns.Add(1) == 1 {
				_, _ = io.Copy(io.Discard, f.conn) // silent from now on
			}
		})
		w := newWorld(t, "response_header_timeout 10s", nil)
		for _, h := range provisioned(t) {
			h.directive.originLimits.Pings = origin.PingTimes{Silence: 50 * time.Millisecond, Answer: 100 * time.Millisecond}
		}
		c := w.dial()
		for i, want := range []int{200, want, 200} {
			c.send(fmt.Sprintf("%s https://%s/ HTTP/1.1\nHost: x\n\n", method, server))
			res, body := c.response(method)
			if res.StatusCode != want {
				t.Errorf("%s, request %d: %s %q, want %d", method, i, res.Status, body, want)
			}
			if status := res.Header.Get("Proxy-Status"); want == 504 && !strings.Contains(status, "connection_read_timeout") {
				t.Errorf("%s: Proxy-Status %q", method, status)
			}
		}
	}
}

// Nothing is written for a status without content: net/http and quic-go treat that as an
// error, and would reset the stream.
func TestNoContentOverHTTP2(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var status int
		_, _ = fmt.Sscan(r.URL.Path[1:], &status)
		w.WriteHeader(status)
	}))
	loadCaddyfile(t, "{\nservers {\nprotocols h1 h2c\ntimeouts {\nwrite_idle -1s\n}\n}\n"+strings.TrimPrefix(w.globals(), "{\n")+w.site("hosts proxy.example"))
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	for _, status := range []int{http.StatusNoContent, http.StatusNotModified, http.StatusOK} {
		r, _ := http.NewRequest(http.MethodGet, fmt.Sprintf("http://%s/%d", w.proxy, status), nil)
		r.Host = w.origin.Listener.Addr().String()
		res, err := transport.RoundTrip(r)
		if err != nil {
			t.Errorf("%d: %v", status, err)
			continue
		}
		if _, err := res.Body.Read(make([]byte, 1)); res.StatusCode != status || res.ProtoMajor != 2 || err == nil || err.Error() != "EOF" {
			t.Errorf("%d: got %s %s, %v", status, res.Proto, res.Status, err)
		}
		res.Body.Close()
	}
}
