// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// uploadWorld is a world whose origin responds to an upload with the length and the hash of what
// it got, and which two sites lead to: the fast path serves the clients of one, Caddy's server
// those of the other.
func uploadWorld(t *testing.T) (w *world, ways map[string]string, failed *atomic.Int64) {
	failed = new(atomic.Int64)
	w = newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		n, err := io.Copy(hash, r.Body)
		if err != nil {
			failed.Add(1)
			return
		}
		fmt.Fprintf(w, "%d %x %s", n, hash.Sum(nil), r.Trailer.Get("X-Sum"))
	}))
	other := *w
	other.proxy = freeAddress(t)
	w.load(w.site("zone one") + byCaddy(other.site("zone two")))
	return w, map[string]string{"fast path": w.proxy, "ordinary way": other.proxy}, failed
}

// pieces returns a reader of content in pieces of random sizes.
func pieces(content []byte) io.Reader {
	r, w := io.Pipe()
	go func() {
		for len(content) > 0 {
			n := min(len(content), 1+rand.IntN(100_000))
			if _, err := w.Write(content[:n]); err != nil {
				return
			}
			content = content[n:]
		}
		_ = w.Close()
	}()
	return r
}

// Content arrives as it was sent, whatever its size and framing, also on a connection that has
// carried content before.
func TestUploads(t *testing.T) {
	w, ways, _ := uploadWorld(t)
	for way, proxy := range ways {
		c := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: proxy}), MaxConnsPerHost: 1}}
		defer c.CloseIdleConnections()
		for _, size := range []int{0, 1, 100, 3_000, 4 << 10, 5_000, 32 << 10, 40_000, 64 << 10, 1 << 20, 20 << 20} {
			for _, chunked := range []bool{false, true} {
				content := make([]byte, size)
				_, _ = rand.NewChaCha8([32]byte{}).Read(content)
				r, err := http.NewRequest(http.MethodPost, w.origin.URL, pieces(content))
				if err != nil {
					t.Fatal(err)
				}
				r.ContentLength = int64(size)
				want := fmt.Sprintf("%d %x ", size, sha256.Sum256(content))
				if chunked {
					r.ContentLength, r.Trailer = -1, http.Header{"X-Sum": {"42"}}
					want += "42"
				}
				res, err := c.Do(r)
				if err != nil {
					t.Fatalf("%s, %d bytes, chunked %t: %v", way, size, chunked, err)
				}
				got, _ := io.ReadAll(res.Body)
				if res.Body.Close(); string(got) != want {
					t.Errorf("%s, %d bytes, chunked %t: the origin got %s, want %s", way, size, chunked, got, want)
				}
			}
		}
	}
}

// An upload that a client breaks off reaches the origin as one that is broken off, and no
// goroutine is left of it.
func TestUploadsBrokenOff(t *testing.T) {
	w, ways, failed := uploadWorld(t)
	host := strings.TrimPrefix(w.origin.URL, "http://")
	for way, proxy := range ways {
		goroutines := runtime.NumGoroutine()
		for _, framing := range []string{"Content-Length: 100\n\nhalf", "Content-Length: 1000000\n\n" + strings.Repeat("x", 500_000), "Transfer-Encoding: chunked\n\n5\nhalf", "Transfer-Encoding: chunked\n\n4\nhalf\n"} {
			for _, reset := range []bool{false, true} {
				before := failed.Load()
				c := dialRaw(t, proxy)
				c.send("POST http://" + host + "/ HTTP/1.1\nHost: x\n" + framing)
				if reset {
					_ = c.SetLinger(0)
				}
				_ = c.Close()
				eventually(t, fmt.Sprintf("%s: the origin to notice that %.30q is broken off", way, framing), func() bool { return failed.Load() == before+1 })
			}
		}
		w.origin.CloseClientConnections()
		eventually(t, way+": all goroutines to end", func() bool { return runtime.NumGoroutine() <= goroutines })
	}
}

// Content that the client stops sending ends the request with a 408.
func TestUploadsThatStall(t *testing.T) {
	w, _, failed := uploadWorld(t)
	other := *w
	other.proxy = freeAddress(t)
	loadCaddyfile(t, withServers(w.globals()+w.site("zone one")+byCaddy(other.site("zone two")), withWrapper+"timeouts {\nread_body_idle 500ms\n}"))
	for way, proxy := range map[string]string{"fast path": w.proxy, "ordinary way": other.proxy} {
		for _, framing := range []string{"Content-Length: 100\n\nhalf", "Content-Length: 1000000\n\n" + strings.Repeat("x", 300_000), "Transfer-Encoding: chunked\n\n5\nhalf"} {
			before := failed.Load()
			c := dialRaw(t, proxy)
			c.send("POST " + w.origin.URL + "/ HTTP/1.1\nHost: x\n" + framing)
			if res, body := c.response(http.MethodPost); res.StatusCode != http.StatusRequestTimeout || !res.Close {
				t.Errorf("%s, %.30q: %s, %q", way, framing, res.Status, body)
			}
			eventually(t, way+": the origin to notice", func() bool { return failed.Load() == before+1 })
		}
	}
}

// An origin that responds before it has read the content, and closes, is passed on to a client that
// is still sending, and the connection ends in stages.
func TestUploadsAnsweredEarly(t *testing.T) {
	_, ways, _ := uploadWorld(t)
	for way, proxy := range ways {
		for _, length := range []string{"Content-Length: 30000000\n\n", "Transfer-Encoding: chunked\n\n1c9c380\n"} {
			origin := listen(t, func(c *net.TCPConn) {
				buf := make([]byte, 100)
				_, _ = c.Read(buf)
				_, _ = io.WriteString(c, "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
				time.Sleep(10 * time.Millisecond)
			})
			c := dialRaw(t, proxy)
			c.send("POST http://" + origin + "/ HTTP/1.1\nHost: x\n" + length)
			sent := writeInPieces(c, strings.Repeat("x", 30_000_000), 1<<20)
			if res, body := c.response(http.MethodPost); res.StatusCode != http.StatusForbidden || body != "no" || !res.Close {
				t.Errorf("%s: %s %q", way, res.Status, body)
			}
			_ = c.Close()
			<-sent
		}
	}
}

// Request and response may flow at the same time.
func TestUploadsInFullDuplex(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		buf := make([]byte, 100)
		for {
			n, err := r.Body.Read(buf)
			_, _ = w.Write(bytes.ToUpper(buf[:n]))
			_ = http.NewResponseController(w).Flush()
			if err != nil {
				return
			}
		}
	}))
	c := w.dial()
	c.send("POST " + w.origin.URL + "/ HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n")
	c.readUntil("\r\n\r\n")
	for _, word := range []string{"one", "two", "three"} {
		c.send(fmt.Sprintf("%x\n%s\n", len(word), word))
		if got := c.readUntil(strings.ToUpper(word) + "\r\n"); got == "" {
			t.Errorf("%s is not returned", word)
		}
	}
	c.send("0\n\n")
	c.readUntil("0\r\n\r\n")
}

// A bulk upload takes constant memory, and so does a bulk download.
func TestUploadsTakeConstantMemory(t *testing.T) {
	const size = 1 << 30
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if n != size || err != nil {
			t.Errorf("the origin got %d bytes, %v", n, err)
		}
		w.Header().Set("Content-Length", fmt.Sprint(size))
		_, _ = io.CopyN(w, zeros{}, size)
	}))
	defer origin.Close()
	w := newWorld(t, "", nil)
	c := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: w.proxy})}}
	defer c.CloseIdleConnections()
	most := make(chan uint64, 1)
	ctx, stop := context.WithCancel(t.Context())
	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	go func() {
		var peak uint64
		for ctx.Err() == nil {
			var now runtime.MemStats
			runtime.ReadMemStats(&now)
			peak = max(peak, now.HeapAlloc)
			time.Sleep(20 * time.Millisecond)
		}
		most <- peak
	}()
	r, err := http.NewRequest(http.MethodPost, origin.URL, io.LimitReader(zeros{}, size))
	if err != nil {
		t.Fatal(err)
	}
	r.ContentLength = size
	res, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, res.Body)
	if n != size || err != nil && !errors.Is(err, io.EOF) {
		t.Errorf("the client got %d bytes, %v", n, err)
	}
	_ = res.Body.Close()
	stop()
	if peak := <-most; peak > before.HeapAlloc+32<<20 {
		t.Errorf("%d bytes each way took up to %d MiB", size, (peak-before.HeapAlloc)>>20)
	}
}
