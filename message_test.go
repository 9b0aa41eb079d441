// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// A head reads the same wherever the buffer's end cuts it, even between CR and LF.
func TestReadHeadThroughSmallBuffer(t *testing.T) {
	const size = 16 // bufio's minimum
	for n := range 3 * size {
		value := strings.Repeat("x", n)
		for _, end := range []string{"\r\n", "\n"} {
			r := bufio.NewReaderSize(strings.NewReader("A: "+value+end+"B: 2"+end+end+"rest"), size)
			head, err := readHead(r)
			if want := "A: " + value + "\nB: 2\n"; head != want || err != nil {
				t.Errorf("%d bytes, %q: %q, %v", n, end, head, err)
			}
			if rest, _ := r.Peek(4); string(rest) != "rest" {
				t.Errorf("%d bytes, %q: after the head: %q", n, end, rest)
			}
		}
		// A bare CR is preserved.
		head, err := readHead(bufio.NewReaderSize(strings.NewReader(value+"\rB\r\n\r\n"), size))
		if want := value + "\rB\n"; head != want || err != nil {
			t.Errorf("%d bytes and a bare CR: %q, %v", n, head, err)
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
