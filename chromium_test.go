// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// chromiumPage talks to a WebSocket on its own origin and reports the reply to the origin.
const chromiumPage = `<!doctype html><script>
const tell = text => fetch("/report?" + text)
const socket = new WebSocket("ws://" + location.host + "/socket")
socket.onopen = () => socket.send("hello")
socket.onmessage = message => tell(message.data)
socket.onerror = () => tell("error")
</script>`

// A browser with an HTTPS proxy, which it uses over HTTP/2, loads an http:// page by a
// plain request and opens a WebSocket through a tunnel.
func TestChromium(t *testing.T) {
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("there is no chromium; apt-get install chromium")
	}
	reports := make(chan string, 10)
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/socket":
			chromiumSocket(t, w, r)
		case "/report":
			reports <- r.URL.RawQuery
		default:
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, chromiumPage)
		}
	}))
	_, port, _ := net.SplitHostPort(w.proxy)
	w.load(fmt.Sprintf(`https://:%s {
	tls internal {
		on_demand
	}
	async_proxy {
		hosts proxy.test
		burst 1000
		refill 1000
	}
}
`, port))

	profile, err := os.MkdirTemp("", "async-proxy-test-chromium")
	if err != nil {
		t.Fatal(err)
	}
	// The browser's processes may go on writing for a moment after they were told to exit.
	t.Cleanup(func() {
		eventually(t, "the browser's profile to be removed", func() bool { return os.RemoveAll(profile) == nil })
	})
	command := exec.Command(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
		"--user-data-dir="+profile, "--ignore-certificate-errors",
		"--host-resolver-rules=MAP proxy.test 127.0.0.1", "--proxy-bypass-list=<-loopback>",
		"--proxy-server=https://proxy.test:"+port, w.origin.URL+"/")
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = command.Process.Kill()
		_ = command.Wait()
	}()
	select {
	case text := <-reports:
		if text != "hello" {
			t.Errorf("the socket sent %q, want hello", text)
		}
	case <-time.After(90 * time.Second):
		t.Fatal("the page has reported nothing")
	}
	// The browser also makes requests of its own.
	origin := strings.TrimPrefix(w.origin.URL, "http://")
	var page, socket map[string]any
	for _, line := range w.waitLog("request", 1) {
		if line["host"] == origin && line["path"] == "/" {
			page = line
		}
	}
	for _, line := range w.waitLog("CONNECT tunnel", 1) {
		if line["target"] == origin {
			socket = line
		}
	}
	if page["method"] != http.MethodGet || page["status"] != 200.0 {
		t.Errorf("log line of the page: %v", page)
	}
	if socket["proto"] != "HTTP/2.0" {
		t.Errorf("log line of the socket: %v", socket)
	}
}

// chromiumSocket completes a WebSocket handshake (RFC 6455 §4.2.2) and echoes one short
// message.
func chromiumSocket(t *testing.T, w http.ResponseWriter, r *http.Request) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\n\r\n",
		base64.StdEncoding.EncodeToString(sum[:]))
	frame := make([]byte, 2+4)
	if _, err := io.ReadFull(buffered, frame); err != nil {
		t.Error(err)
		return
	}
	message := make([]byte, frame[1]&0x7f)
	if _, err := io.ReadFull(buffered, message); err != nil {
		t.Error(err)
		return
	}
	for i := range message {
		message[i] ^= frame[2+i%4]
	}
	_, _ = conn.Write(append([]byte{frame[0], byte(len(message))}, message...))
	_, _ = io.Copy(io.Discard, buffered)
}
