// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fastPathConns returns how many connections the process serves on the fast path.
func (c *binaryCaddy) fastPathConns() int {
	c.t.Helper()
	_, text := c.ask(http.MethodGet, "/debug/pprof/goroutine?debug=2", "")
	return strings.Count(text, ".(*clientConn).run(")
}

// Caddy does not exit before a client has its last response, though the client has sent another request.
func TestProcessExitsAfterLastResponse(t *testing.T) {
	const length = 3_000_000
	origin := newSlowOrigin()
	c := binaryStart(t, binaryOptions{global: "grace_period 10s"})
	c.origin = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		origin.asked <- struct{}{}
		<-origin.begin
		w.Header().Set("Content-Length", fmt.Sprint(length))
		_, _ = w.Write(make([]byte, length))
	}))
	t.Cleanup(c.origin.Close)
	conn := c.dial()
	_ = conn.SetReadBuffer(32 << 10) // so that much of the response is still to be sent when Caddy could exit
	conn.get(c.origin.URL+"/", "")
	<-origin.asked
	conn.send("PUT " + c.origin.URL + "/next HTTP/1.1\nHost: x\nContent-Length: 20000\n\n" + strings.Repeat("n", 20_000))
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the listener to close", func() bool { return !binaryListens(c.proxy) })
	origin.begin <- struct{}{}
	res, err := http.ReadResponse(conn.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.CopyN(io.Discard, res.Body, length-10_000)
	if err == nil {
		time.Sleep(2 * time.Second) // Caddy would exit meanwhile
		var rest int64
		rest, err = io.Copy(io.Discard, res.Body)
		n += rest
	}
	if n != length || err != nil || !res.Close {
		t.Errorf("%d bytes, %v, Close %t", n, err, res.Close)
	}
	select {
	case <-c.exited:
		t.Error("Caddy has exited before the client closed its connection")
	default:
	}
	_ = conn.Close()
	select {
	case <-c.exited:
	case <-time.After(patience):
		t.Fatal("Caddy did not exit")
	}
}

// Nor does it exit before a client has the response to an upload that was refused early, whichever server has
// sent that.
func TestProcessExitsAfterEarlyResponse(t *testing.T) {
	const length = 300_000
	origin := listen(t, func(conn *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			_, _ = fmt.Fprintf(conn, "HTTP/1.1 413 Content Too Large\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", length, make([]byte, length))
			_ = conn.CloseWrite()
			_, _ = io.Copy(io.Discard, conn)
		}
	})
	for _, way := range []string{"fast", "ordinary"} {
		t.Run(way, func(t *testing.T) {
			c := binaryStart(t, binaryOptions{global: "grace_period 10s"})
			if way == "ordinary" {
				c.write(strings.Replace(c.caddyfile(""), "\tasync_proxy {", "\tvars way ordinary\n\tasync_proxy {", 1))
				if output, err := c.command("reload", "--config", c.config, "--adapter", "caddyfile", "--address", c.admin).CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, output)
				}
			}
			conn := c.dial()
			_ = conn.SetReadBuffer(16 << 10)
			conn.send("POST http://" + origin + "/ HTTP/1.1\nHost: x\nContent-Length: 1000000\n\n" + strings.Repeat("n", 100_000))
			res, err := http.ReadResponse(conn.r, nil)
			if err != nil || res.StatusCode != http.StatusRequestEntityTooLarge {
				t.Fatalf("%v, %v", res, err)
			}
			c.waitLog("request", 1) // the whole response is in the kernel
			if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Second) // Caddy would exit meanwhile
			conn.send("more")           // which would cause a reset
			time.Sleep(100 * time.Millisecond)
			if n, err := io.Copy(io.Discard, res.Body); n != length || err != nil || !res.Close {
				t.Errorf("%d bytes, %v, Close %t", n, err, res.Close)
			}
			_ = conn.Close()
			select {
			case <-c.exited:
			case <-time.After(patience):
				t.Fatal("Caddy did not exit")
			}
		})
	}
}

// Caddy exits at once if all connections are idle. It waits for responses in progress, also
// those of earlier configs, but no longer than the grace period.
func TestProcessExitsWithClientConns(t *testing.T) {
	for _, row := range []struct {
		name, global string
		slow         bool // a response is in progress
		reloaded     bool // it belongs to an earlier config
		ends         bool // it completes
	}{
		{name: "idle"},
		{name: "in progress", slow: true, ends: true},
		{name: "in progress, of an earlier config", slow: true, reloaded: true, ends: true},
		{name: "in progress, in the grace period", global: "grace_period 1h", slow: true, ends: true},
		{name: "longer than the grace period", global: "grace_period 500ms", slow: true},
	} {
		t.Run(row.name, func(t *testing.T) {
			origin := newSlowOrigin()
			c := binaryStart(t, binaryOptions{global: row.global})
			c.origin = httptest.NewServer(origin)
			t.Cleanup(func() {
				c.origin.CloseClientConnections()
				c.origin.Close()
			})
			conns := []*rawConn{c.dial(), c.dial(), c.dial()}
			for _, conn := range conns {
				conn.gets(c.origin.URL + "/")
			}
			eventually(t, "all connections to be on the fast path", func() bool { return c.fastPathConns() == len(conns) })
			conns[0].send("GET " + c.origin.URL + "/ HTTP/1.1\nHo")
			conns[0].awaitRead() // closing a socket with unread data would reset it
			silent := c.dial()   // sends no request
			eventually(t, "the new connection to be accepted", func() bool { return c.fastPathConns() == len(conns)+1 })
			if row.slow {
				conns[2].get(c.origin.URL+"/slow", "")
				<-origin.asked
			}
			if row.reloaded {
				c.reload("dial_timeout 9s")
			}
			if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			for _, conn := range append(conns[:2:2], silent) {
				if rest := conn.readAll(); rest != "" {
					t.Errorf("an idle connection got %q before its end", rest)
				}
			}
			if row.ends {
				origin.begin <- struct{}{}
				conns[2].readUntil("first ")
				time.Sleep(200 * time.Millisecond) // the process is still running
				origin.end <- struct{}{}
				if rest := conns[2].readAll(); !strings.HasSuffix(rest, "last\r\n0\r\n\r\n") {
					t.Errorf("the rest of the response is %q", rest)
				}
			}
			select {
			case <-c.exited:
			case <-time.After(patience):
				t.Fatal("Caddy did not exit")
			}
			if code := c.cmd.ProcessState.ExitCode(); code != 0 {
				t.Errorf("exit code %d, want 0", code)
			}
		})
	}
}

// Large content is spliced: it stays in the kernel.
func TestProcessSplicesOnClientConns(t *testing.T) {
	const size = 64 << 20
	c := binaryStart(t, binaryOptions{})
	c.origin = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/large" {
			w.Header().Set("Content-Length", fmt.Sprint(size))
			_, _ = io.CopyN(w, zeros{}, size)
		}
	}))
	t.Cleanup(func() { closeServer(t, c.origin) })
	conn := c.dial()
	conn.gets(c.origin.URL + "/")
	read := func() int {
		t.Helper()
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", c.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return binaryNumber(t, string(text), `rchar: (\d+)`)
	}
	before := read()
	if n := len(conn.gets(c.origin.URL + "/large")); n != size {
		t.Errorf("got %d bytes, want %d", n, size)
	}
	if n := read() - before; n > size/2 {
		t.Errorf("%d bytes of %d were read by the process", n, size)
	}
	eventually(t, "the connection to be the only one on the fast path", func() bool { return c.fastPathConns() == 1 })
}

// A reload closes no connection that the new config serves: idle ones move at once, busy
// ones after their response. If the new config does not serve them, they close, busy ones
// after their response.
func TestClientConnReload(t *testing.T) {
	for _, row := range []struct {
		name  string
		from  form
		to    form // what the new config expects
		route bool // in the new config, Caddy's server serves the site
	}{
		{name: "served again", from: forms[0], to: forms[0]},
		{name: "not served again", from: forms[0], to: forms[0], route: true},
		{name: "over TLS", from: forms[1], to: forms[1]},
		{name: "over TLS, not served again", from: forms[1], to: forms[1], route: true},
		{name: "from TLS to none", from: forms[1], to: forms[0]},
		{name: "from none to TLS", from: forms[0], to: forms[1]},
		{name: "with the PROXY protocol", from: forms[2], to: forms[2]},
		{name: "with TLS and the PROXY protocol", from: forms[3], to: forms[3]},
		{name: "to the PROXY protocol", from: forms[0], to: forms[2]},
		{name: "to other settings of TLS", from: forms[1], to: form{overTLS: true, directives: "protocols tls1.3"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			stays := row.from == row.to && !row.route
			origin := newSlowOrigin()
			w := newWorld(t, "", origin)
			load := func(f form, site string) {
				loadCaddyfile(t, withServers(w.globals()+f.site(t, site), f.servers(true)))
			}
			load(row.from, w.site(""))
			once := func(f form) {
				c := f.dial(t, w.proxy)
				c.gets(w.origin.URL + "/")
				_ = c.Close()
			}
			once(row.from) // opens a connection to the origin, which stays open
			eventually(t, "that to be over", func() bool { return fastPathConns() == 0 })
			files, goroutines := descriptors(t, "self"), runtime.NumGoroutine()
			old := program.listeners.All()[0]
			dial := func() *rawConn { return w.dialFastPathOver(row.from) }
			idle, half, waits, begun := dial(), dial(), dial(), dial()
			half.send("GET " + w.origin.URL + "/ HTTP/1.1\nHo")
			for _, c := range []*rawConn{begun, waits} {
				c.get(w.origin.URL+"/slow", "")
				<-origin.asked
				if c == begun {
					origin.begin <- struct{}{}
					c.readUntil("first ")
				}
			}
			half.awaitRead() // closing a socket with unread data would reset it
			site := w.site("dial_timeout 9s")
			if row.route {
				site = byCaddy(site)
			}
			load(row.to, site)
			eventually(t, "the idle connections to move", func() bool { return len(old.Clients()) == 2 })
			origin.end <- struct{}{}
			if rest := begun.readUntil("0\r\n\r\n"); !strings.HasSuffix(rest, "last\r\n0\r\n\r\n") {
				t.Errorf("the rest of the response that had begun is %q", rest)
			}
			origin.begin <- struct{}{}
			origin.end <- struct{}{}
			if res, body := waits.response(http.MethodGet); body != "first last" || res.Close == stays {
				t.Errorf("the response that was awaited: %q, close: %t", body, res.Close)
			}
			for name, c := range map[string]*rawConn{"idle": idle, "in the middle of a head": half, "awaited": waits, "begun": begun} {
				if !stays {
					if rest := c.readAll(); rest != "" {
						t.Errorf("%s: %q", name, rest)
					}
					continue
				}
				if c == half {
					c.send("st: x\n\n")
				} else {
					c.get(w.origin.URL+"/", "")
				}
				if res, body := c.response(http.MethodGet); body != "last" || res.Close {
					t.Errorf("%s, after the reload: %q, close: %t", name, body, res.Close)
				}
			}
			if n := fastPathConns(); stays != (n == 4) {
				t.Errorf("%d connections moved to the new config", n)
			}
			for _, c := range []*rawConn{idle, half, waits, begun} {
				_ = c.Close()
			}
			once(row.to)
			eventually(t, "all connections to be gone", func() bool {
				return len(old.Clients())+fastPathConns() == 0 &&
					(descriptors(t, "self") <= files && runtime.NumGoroutine() <= goroutines || row.from.overTLS != row.to.overTLS) // HTTP/3 has some
			})
		})
	}
}
