// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/http2"
)

const (
	protoBulk    = 16 << 20                // bytes each way
	protoMany    = 300                     // tunnels at once
	protoStall   = time.Second             // after which Caddy takes a request for stalled
	protoSilence = 2200 * time.Millisecond // of a tunnel all the same
	// protoStreams are opened on one connection of HTTP/2 or HTTP/3: fewer than
	// Caddy allows, since further ones would wait for those to end.
	protoStreams = 80
)

var protoAll = []string{"h1", "h1-tls", "h2", "h2c", "h3"}

// protoIsStream reports whether tunnels of a protocol are streams, which share
// a connection.
func protoIsStream(protocol string) bool { return !strings.HasPrefix(protocol, "h1") }

// protoWorld is a Caddy with one proxy for h1 and h2c, and one for TLS.
type protoWorld struct {
	*world
	secure  string // host:port of the proxy with TLS
	global  string // further global options
	site    string // further directives of the sites
	preface string // what a client has to send before anything else
	ends    bool   // the client's connection has no half-close

	transports map[string]http.RoundTripper
	opened     map[string]int // streams of each protocol
}

func newProtoWorld(t *testing.T, w protoWorld) *protoWorld {
	w.world = &world{t: t, proxy: freeAddress(t), logs: filepath.Join(t.TempDir(), "caddy.log")}
	w.secure = freeAddress(t)
	w.transports, w.opened = map[string]http.RoundTripper{}, map[string]int{}
	if !strings.Contains(w.global, "protocols") {
		w.global = strings.Replace(w.global, "servers {", "servers {\nprotocols h1 h2 h2c h3", 1)
	}
	w.global += fmt.Sprintf("\nstorage file_system %s", t.TempDir())
	w.reload("")
	return &w
}

// reload loads the world's own sites and some more.
func (w *protoWorld) reload(more string) {
	w.t.Helper()
	const proxy = "async_proxy {\nhosts proxy.test\nburst 1000000\nrefill 1000000\n}\n"
	_, plain, _ := net.SplitHostPort(w.proxy)
	_, secure, _ := net.SplitHostPort(w.secure)
	loadCaddyfile(w.t, fmt.Sprintf("{\nadmin off\npersist_config off\nskip_install_trust\nauto_https disable_redirects\n"+
		"grace_period 5s\ndefault_bind 127.0.0.1\nlog {\noutput file %s\nformat json\nlevel DEBUG\n}\n%s\n}\n"+
		"http://:%s {\n%s\n%s}\nhttps://:%s {\n%s\ntls internal {\non_demand\n}\n%s}\n%s",
		w.logs, w.global, plain, w.site, proxy, secure, w.site, proxy, more))
}

func protoTLS(alpn string) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, ServerName: "proxy.test", NextProtos: []string{alpn}}
}

// transport returns what opens the next stream of a protocol.
func (w *protoWorld) transport(protocol string) http.RoundTripper {
	if w.opened[protocol]%protoStreams == 0 {
		delete(w.transports, protocol)
	}
	w.opened[protocol]++
	if rt := w.transports[protocol]; rt != nil {
		return rt
	}
	var rt http.RoundTripper
	if protocol == "h3" {
		h3 := &http3.Transport{TLSClientConfig: protoTLS("h3")}
		w.t.Cleanup(func() { h3.Close() })
		rt = h3
	} else {
		h2 := &http2.Transport{AllowHTTP: true, DialTLSContext: func(context.Context, string, string, *tls.Config) (net.Conn, error) {
			if protocol == "h2c" {
				return net.Dial("tcp4", w.proxy)
			}
			return tls.Dial("tcp4", w.secure, protoTLS("h2"))
		}}
		w.t.Cleanup(h2.CloseIdleConnections)
		rt = h2
	}
	w.transports[protocol] = rt
	return rt
}

// protoTunnel is the client's end of a tunnel.
type protoTunnel struct {
	io.Reader
	io.Writer
	CloseWrite func() error
	Reset      func() // both directions, as a failure
	Close      func()
}

// protoOpen opens a tunnel, which is closed when the test ends.
func protoOpen(t *testing.T, protocol string, w *protoWorld, target string) *protoTunnel {
	t.Helper()
	if protoIsStream(protocol) {
		return protoOpenStream(t, protocol, w, target)
	}
	return protoOpenConn(t, protocol, w, target, "")
}

// protoOpenConn also sends some bytes along with the request.
func protoOpenConn(t *testing.T, protocol string, w *protoWorld, target, early string) *protoTunnel {
	t.Helper()
	address := w.proxy
	if protocol == "h1-tls" {
		address = w.secure
	}
	raw := dialRaw(t, address)
	if _, err := io.WriteString(raw, w.preface); err != nil {
		t.Fatal(err)
	}
	var conn interface {
		net.Conn
		CloseWrite() error
	} = raw.TCPConn
	if protocol == "h1-tls" {
		conn = tls.Client(raw.TCPConn, protoTLS("http/1.1"))
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n%s", target, early); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("CONNECT %s: %v, %v", target, res, err)
	}
	tunnel := &protoTunnel{
		Reader: r, Writer: conn, CloseWrite: conn.CloseWrite,
		Reset: func() { raw.SetLinger(0); raw.TCPConn.Close() },
		Close: func() { conn.Close() },
	}
	t.Cleanup(tunnel.Close)
	return tunnel
}

func protoOpenStream(t *testing.T, protocol string, w *protoWorld, target string) *protoTunnel {
	t.Helper()
	scheme := "https://"
	address := w.secure
	if protocol == "h2c" {
		scheme, address = "http://", w.proxy
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	body, pipe := io.Pipe()
	req, err := http.NewRequestWithContext(ctx, http.MethodConnect, scheme+address, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = target
	res, err := w.transport(protocol).RoundTrip(req)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("CONNECT %s: %v, %v", target, res, err)
	}
	tunnel := &protoTunnel{
		Reader: res.Body, Writer: pipe, CloseWrite: pipe.Close, Reset: cancel,
		Close: func() { pipe.Close(); res.Body.Close() },
	}
	t.Cleanup(tunnel.Close)
	return tunnel
}

// say sends a text and half-closes if it is the last one.
func (c *protoTunnel) say(t *testing.T, text string, last bool) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("sending: %v", err)
	}
	if last {
		if err := c.CloseWrite(); err != nil {
			t.Fatalf("half-closing: %v", err)
		}
	}
}

// hear wants to read a text.
func (c *protoTunnel) hear(t *testing.T, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("read %.100q, %v, want %.100q", got[:n], err, want)
	}
}

// hearEnd wants to read a text and then an orderly end.
func (c *protoTunnel) hearEnd(t *testing.T, want string) {
	t.Helper()
	if got, err := io.ReadAll(c); err != nil || string(got) != want {
		t.Fatalf("read %d bytes (%.100q), %v, want %d (%.100q) and the end", len(got), got, err, len(want), want)
	}
}

// echo sends a text and wants it back.
func (c *protoTunnel) echo(t *testing.T, text string) {
	t.Helper()
	c.say(t, text, false)
	c.hear(t, text)
}

func protoEchoes(t *testing.T) string {
	return listen(t, func(conn *net.TCPConn) { io.Copy(conn, conn) })
}

// protoGet waits for what a target reports.
func protoGet[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatal("the target reports nothing")
	}
	return v
}

// protoHeard is what a target has read to the end, and how that came.
type protoHeard struct {
	text string
	err  error
}

func protoHear(conn net.Conn) protoHeard {
	data, err := io.ReadAll(conn)
	return protoHeard{string(data), err}
}

// protoRows are what each protocol is to do. Those that take their time are
// gone through for all protocols at once, below.
var protoRows = []struct {
	name string
	only []string // protocols; nil: all
	run  func(t *testing.T, protocol string, w *protoWorld)
}{
	{"echo", nil, func(t *testing.T, protocol string, w *protoWorld) {
		c := protoOpen(t, protocol, w, protoEchoes(t))
		for i := range 50 {
			c.echo(t, fmt.Sprintf("message %d", i))
		}
		c.say(t, "the last one", true)
		c.hearEnd(t, "the last one")
	}},
	{"early data", []string{"h1", "h1-tls"}, func(t *testing.T, protocol string, w *protoWorld) {
		early := strings.Repeat("early ", 5000) // more than net/http buffers
		c := protoOpenConn(t, protocol, w, protoEchoes(t), early)
		c.say(t, "late", true)
		c.hearEnd(t, early+"late")
	}},
	{"target speaks first", nil, func(t *testing.T, protocol string, w *protoWorld) {
		c := protoOpen(t, protocol, w, listen(t, func(conn *net.TCPConn) {
			io.WriteString(conn, "220 ready\r\n")
			io.Copy(conn, conn)
		}))
		c.hear(t, "220 ready\r\n")
		c.echo(t, "HELO there")
	}},
	{"client half-closes", nil, func(t *testing.T, protocol string, w *protoWorld) {
		answer := strings.Repeat("answer ", 100_000)
		heard := make(chan protoHeard, 1)
		c := protoOpen(t, protocol, w, listen(t, func(conn *net.TCPConn) {
			heard <- protoHear(conn)
			time.Sleep(50 * time.Millisecond)
			io.WriteString(conn, answer)
		}))
		c.say(t, "question", true)
		if got := protoGet(t, heard); got != (protoHeard{"question", nil}) {
			t.Fatalf("the target reads %+v", got)
		}
		c.hearEnd(t, answer)
	}},
	{"target half-closes", nil, func(t *testing.T, protocol string, w *protoWorld) {
		heard := make(chan protoHeard, 1)
		c := protoOpen(t, protocol, w, listen(t, func(conn *net.TCPConn) {
			io.ReadFull(conn, make([]byte, 5))
			io.WriteString(conn, "all I have to say")
			conn.CloseWrite()
			heard <- protoHear(conn)
		}))
		c.say(t, "hello", false)
		c.hearEnd(t, "all I have to say")
		want := ""
		if !protoIsStream(protocol) && !w.ends {
			want = strings.Repeat("and yet ", 50_000)
			c.say(t, want, true)
		}
		if got := protoGet(t, heard); got != (protoHeard{want, nil}) {
			t.Fatalf("the target reads %d bytes (%.100q), %v, want %d and the end", len(got.text), got.text, got.err, len(want))
		}
	}},
	{"client resets", nil, func(t *testing.T, protocol string, w *protoWorld) {
		heard := make(chan protoHeard, 1)
		c := protoOpen(t, protocol, w, listen(t, func(conn *net.TCPConn) {
			io.WriteString(conn, "x")
			heard <- protoHear(conn)
		}))
		c.hear(t, "x")
		c.Reset()
		if got := protoGet(t, heard); !errors.Is(got.err, syscall.ECONNRESET) {
			t.Fatalf("the target reads %q, %v, want a reset", got.text, got.err)
		}
	}},
	{"target resets", nil, func(t *testing.T, protocol string, w *protoWorld) {
		c := protoOpen(t, protocol, w, listen(t, func(conn *net.TCPConn) {
			io.WriteString(conn, "x")
			io.ReadFull(conn, make([]byte, 1))
			conn.SetLinger(0)
		}))
		c.hear(t, "x")
		c.say(t, "y", false)
		got, err := io.ReadAll(c)
		if err == nil || len(got) > 0 {
			t.Fatalf("the client reads %q, %v, want an error", got, err)
		}
		if !protoIsStream(protocol) && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("the client reads %v, want a reset", err)
		}
	}},
	{"bulk both ways", nil, protoBothWays},
	{"many at once", nil, func(t *testing.T, protocol string, w *protoWorld) {
		target := protoEchoes(t)
		tunnels := make([]*protoTunnel, protoMany)
		text := func(i int) string { return strings.Repeat(fmt.Sprintf("%07d\n", i), 1<<10/8) }
		for i := range tunnels {
			tunnels[i] = protoOpen(t, protocol, w, target)
		}
		for i, c := range tunnels {
			c.say(t, text(i), i%2 == 0)
		}
		for i, c := range slices.Backward(tunnels) {
			c.hear(t, text(i))
		}
	}},
}

func protoRandom(seed byte) []byte {
	data := make([]byte, protoBulk)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

// protoExchange sends data while it reads as many bytes, of which it returns
// the checksum.
func protoExchange(conn io.ReadWriter, data []byte) (sum [sha256.Size]byte, err error) {
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		sent <- err
	}()
	hash := sha256.New()
	_, err = io.CopyN(hash, conn, int64(len(data)))
	hash.Sum(sum[:0])
	return sum, errors.Join(err, <-sent)
}

func protoBothWays(t *testing.T, protocol string, w *protoWorld) {
	type result struct {
		sum [sha256.Size]byte
		err error
	}
	up, down := protoRandom(1), protoRandom(2)
	results := make(chan result, 1)
	c := protoOpen(t, protocol, w, listen(t, func(conn *net.TCPConn) {
		sum, err := protoExchange(conn, down)
		if err == nil {
			_, err = io.Copy(io.Discard, conn)
		}
		results <- result{sum, err}
	}))
	sum, err := protoExchange(c, up)
	if err != nil || sum != sha256.Sum256(down) {
		t.Fatalf("to the client: %v, or the checksum is wrong", err)
	}
	c.say(t, "", true)
	c.hearEnd(t, "")
	if at := protoGet(t, results); at.err != nil || at.sum != sha256.Sum256(up) {
		t.Fatalf("to the target: %v, or the checksum is wrong", at.err)
	}
}

// protoTable goes through the table in one world.
func protoTable(t *testing.T, protocols []string, w *protoWorld) {
	for _, protocol := range protocols {
		for _, row := range protoRows {
			if row.only == nil || slices.Contains(row.only, protocol) {
				t.Run(protocol+"/"+row.name, func(t *testing.T) { row.run(t, protocol, w) })
			}
		}
	}
	between := func(name string, what func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			target := protoEchoes(t)
			tunnels := map[string]*protoTunnel{}
			for _, protocol := range protocols {
				tunnels[protocol] = protoOpen(t, protocol, w, target)
				tunnels[protocol].echo(t, "before")
			}
			what(t)
			for _, protocol := range protocols {
				t.Run(protocol, func(t *testing.T) {
					tunnels[protocol].echo(t, "after")
					tunnels[protocol].say(t, "the end", true)
					tunnels[protocol].hearEnd(t, "the end")
				})
			}
		})
	}
	between("silence", func(*testing.T) { time.Sleep(protoSilence) })
	between("reload", func(t *testing.T) {
		more := freeAddress(t)
		w.reload(fmt.Sprintf("http://%s {\nrespond new\n}\n", more))
		c := dialRaw(t, more)
		c.send(w.preface + "GET / HTTP/1.1\nHost: " + more + "\n\n")
		if _, body := c.response(http.MethodGet); body != "new" {
			t.Fatalf("the new site answers %q", body)
		}
	})
}

func protoServers(options string) string {
	return fmt.Sprintf("servers {\ntimeouts {\nread_body_idle %s\nwrite_idle %[1]s\n}\n%s\n}", protoStall, options)
}

func TestProtoTable(t *testing.T) {
	for _, variant := range []struct {
		name      string
		protocols []string
		world     protoWorld
	}{
		{"plain", protoAll, protoWorld{global: protoServers("")}},
		{"log and metrics", protoAll, protoWorld{global: "metrics\n" + protoServers(""), site: "log"}},
		{"proxy_protocol", []string{"h1"}, protoWorld{
			global:  protoServers("listener_wrappers {\nproxy_protocol {\ntimeout 5s\n}\n}"),
			preface: "PROXY TCP4 127.0.0.1 127.0.0.1 1111 2222\r\n",
		}},
		{"protocols h1", []string{"h1"}, protoWorld{global: protoServers("protocols h1"), ends: true}},
	} {
		t.Run(variant.name, func(t *testing.T) {
			protoTable(t, variant.protocols, newProtoWorld(t, variant.world))
		})
	}
}

func TestProtoNothingIsLeft(t *testing.T) {
	w := newProtoWorld(t, protoWorld{global: protoServers("")})
	target := protoEchoes(t)
	use := func(t *testing.T, protocol string) {
		c := protoOpen(t, protocol, w, target)
		c.echo(t, "hello")
		c.say(t, "", true)
		c.hearEnd(t, "")
		c.Close()
	}
	for _, protocol := range protoAll {
		use(t, protocol)
	}
	w.waitLog("CONNECT tunnel closed", len(protoAll))
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	time.Sleep(200 * time.Millisecond) // until what the warm-up has left is settled
	goroutines, open := runtime.NumGoroutine(), descriptors()
	for range 500 {
		use(t, "h1")
	}
	defer func() {
		if t.Failed() {
			t.Logf("%d goroutines and %d descriptors, before there were %d and %d", runtime.NumGoroutine(), descriptors(), goroutines, open)
		}
	}()
	eventually(t, "goroutines to end", func() bool { return runtime.NumGoroutine() <= goroutines })
	eventually(t, "descriptors to be closed", func() bool { return descriptors() <= open })
}
