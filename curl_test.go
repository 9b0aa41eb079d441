// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// curl runs curl through the proxy and returns its output.
func (w *world) curl(args ...string) string {
	w.t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command("curl", append([]string{"-sS", "--max-time", "20", "-x", "http://" + w.proxy}, args...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("curl %q: %v: %s", args, err, stderr.String())
	}
	return string(out)
}

// TestCurl does what package managers and scripts do, with curl.
func TestCurl(t *testing.T) {
	const file = "0123456789abcdef"
	modified := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	events := make(chan struct{})
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasPrefix(r.URL.Path, "/file"):
			http.ServeContent(w, r, "file", modified, strings.NewReader(file))
		case r.URL.Path == "/echo":
			w.Header().Set("X-Expect", r.Header.Get("Expect"))
			w.Header().Set("X-Length", fmt.Sprint(r.ContentLength))
			_, _ = io.Copy(w, r.Body)
		case r.URL.Path == "/events":
			w.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprint(w, "data: one\n\n")
			_ = http.NewResponseController(w).Flush()
			<-events
			fmt.Fprint(w, "data: two\n\n")
		}
	}))
	origin := w.origin.URL
	status := []string{"-o", "/dev/null", "-w", "%{http_code}"}

	t.Run("whole", func(t *testing.T) { curlGives(t, file, w.curl(origin+"/file")) })
	t.Run("range", func(t *testing.T) { curlGives(t, file[4:8], w.curl("-r", "4-7", origin+"/file")) })
	t.Run("resumed", func(t *testing.T) { curlGives(t, file[10:], w.curl("-C", "10", origin+"/file")) })
	t.Run("not modified", func(t *testing.T) {
		curlGives(t, "304", w.curl(append(status, "-z", "Fri, 02 Jan 2026 03:04:05 GMT", origin+"/file")...))
	})
	t.Run("head", func(t *testing.T) {
		if head := w.curl("-I", origin+"/file"); !strings.Contains(head, "Content-Length: 16\r\n") {
			t.Errorf("got %q", head)
		}
	})
	t.Run("expect", func(t *testing.T) {
		out := w.curl("-i", "-H", "Expect: 100-continue", "-d", "hello", origin+"/echo")
		if !strings.HasPrefix(out, "HTTP/1.1 100 Continue") || !strings.Contains(out, "X-Expect: 100-continue") || !strings.HasSuffix(out, "hello") {
			t.Errorf("got %q", out)
		}
	})
	t.Run("chunks", func(t *testing.T) {
		out := w.curl("-i", "-H", "Transfer-Encoding: chunked", "-d", "hello", origin+"/echo")
		if !strings.Contains(out, "X-Length: -1") || !strings.HasSuffix(out, "hello") {
			t.Errorf("got %q", out)
		}
	})
	t.Run("many files over one connection", func(t *testing.T) {
		args := []string{"-w", "%{num_connects}\n"}
		for i := range 100 {
			args = append(args, fmt.Sprintf("%s/file/%d", origin, i))
		}
		out := w.curl(args...)
		if n := strings.Count(out, file); n != 100 {
			t.Errorf("%d of 100 files are complete", n)
		}
		if n := strings.Count(out, file+"0\n"); n != 99 {
			t.Errorf("%d files came over the first connection, want 99", n)
		}
	})
	t.Run("through a tunnel", func(t *testing.T) { curlGives(t, file, w.curl("-p", origin+"/file")) })
	t.Run("events", func(t *testing.T) {
		cmd := exec.Command("curl", "-sSN", "--max-time", "20", "-x", "http://"+w.proxy, origin+"/events")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		first := make([]byte, len("data: one\n\n"))
		if _, err := io.ReadFull(out, first); err != nil {
			t.Errorf("the first event did not arrive before the second was sent: %v", err)
		}
		close(events)
		rest, _ := io.ReadAll(out)
		curlGives(t, "data: two\n\n", string(rest))
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
}

func curlGives(t *testing.T, want, got string) {
	t.Helper()
	if got != want {
		t.Errorf("curl gives %q, want %q", got, want)
	}
}
