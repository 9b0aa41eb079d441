// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// An origin's trailers go to the client, except for fields not permitted there, whether
// announced or not and whatever the origin's protocol.
func TestTrailersAreFiltered(t *testing.T) {
	const forbidden = "age authorization connection content-encoding content-length content-range content-type cookie host http2-settings if-match keep-alive location " +
		"proxy-authenticate proxy-authentication-info proxy-authorization proxy-connection set-cookie te trailer transfer-encoding upgrade vary via www-authenticate"
	names := append(strings.Fields(forbidden), "grpc-status", "server-timing", "x-sum")
	want := []string{"Grpc-Status", "Server-Timing", "X-Sum"}
	var lines strings.Builder
	var fields []string
	for _, name := range names {
		lines.WriteString(name + ": 1\n")
		fields = append(fields, name, "1")
	}
	for _, announced := range []bool{true, false} {
		head := []string{":status", "200"}
		if announced {
			head = append(head, "trailer", strings.Join(names, ", "))
		}
		secure := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
			f.longHeaders(stream, false, head...)
			_ = f.WriteData(stream, false, []byte("ok"))
			f.longHeaders(stream, true, fields...)
		})
		answer := "HTTP/1.1 200 OK\nConnection: x-nominated\nTransfer-Encoding: chunked\n"
		if announced {
			answer += "Trailer: " + strings.Join(names, ", ") + "\n"
		}
		plain := startFixedOrigin(t, answer+"\n2\nok\n0\nx-nominated: 1\n"+lines.String()+"\n")
		onBothPaths(t, "", func(t *testing.T, w *world) {
			for _, url := range []string{"http://" + plain, "https://" + secure} {
				c := w.dial()
				c.send("GET " + url + "/ HTTP/1.1\nHost: x\nTE: trailers\n\n")
				res, err := http.ReadResponse(c.r, nil)
				if err != nil {
					t.Fatal(err)
				}
				if got := slices.Sorted(maps.Keys(res.Trailer)); announced && !slices.Equal(got, want) {
					t.Errorf("%s: %v are announced, want %v", url, got, want)
				}
				if body, err := io.ReadAll(res.Body); string(body) != "ok" || err != nil {
					t.Errorf("%s: %q, %v", url, body, err)
				}
				if got := slices.Sorted(maps.Keys(res.Trailer)); !slices.Equal(got, want) {
					t.Errorf("%s, announced %v: trailers %v, want %v", url, announced, got, want)
				}
			}
		})
	}
}

// If a field in the head is also announced as a trailer but no such trailer arrives, the
// client gets it once, in the head.
func TestAnnouncedTrailerMissing(t *testing.T) {
	origin := startFixedOrigin(t, "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nTrailer: X-Sum, X-Other\nX-Sum: head\n\n2\nok\n0\nX-Other: 1\n\n")
	onBothPaths(t, "", func(t *testing.T, w *world) {
		c := w.dial()
		c.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\n\n")
		res, _ := c.response(http.MethodGet)
		if res.Header.Get("X-Sum") != "head" || res.Trailer.Get("X-Sum") != "" || res.Trailer.Get("X-Other") != "1" {
			t.Errorf("head %v, trailers %v", res.Header, res.Trailer)
		}
	})
}
