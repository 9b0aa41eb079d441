// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"maps"
	"net/http"
	"net/netip"
	"net/textproto"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http/httpguts"
)

// fields parses a header section, one field per line, as net/http does.
func fields(t *testing.T, text string) http.Header {
	t.Helper()
	h, err := readFields(text)
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return h
}

func readFields(text string) (http.Header, error) {
	h, err := textproto.NewReader(bufio.NewReader(strings.NewReader(text + "\n\n"))).ReadMIMEHeader()
	return http.Header(h), err
}

func TestRemoveHopByHop(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{
		{"nothing to remove", "Accept: a\nAccept: b\nCookie: c", "Accept: a\nAccept: b\nCookie: c"},
		{"no fields", "", ""},
		{"the fixed ones", "Connection: close\nKeep-Alive: timeout=5\nProxy-Connection: keep-alive\nTE: trailers\n" +
			"Transfer-Encoding: chunked\nUpgrade: h2c\nProxy-Authenticate: Basic\nProxy-Authentication-Info: x\nProxy-Authorization: Basic x\nAccept: a", "Accept: a"},
		{"the trailer announcement stays", "Trailer: X-Sum", "Trailer: X-Sum"},
		{"the origin's authentication stays", "Authorization: Basic x\nWWW-Authenticate: Basic", "Authorization: Basic x\nWWW-Authenticate: Basic"},
		{"nominated", "Connection: X-Hop\nX-Hop: 1\nX-End: 2", "X-End: 2"},
		{"named in Connection, on several lines", "Connection: X-Hop\nX-Hop: 1\nX-Hop: 2", ""},
		{"named before the field", "X-Hop: 1\nConnection: X-Hop", ""},
		{"named in another case", "Connection: x-HOP\nX-Hop: 1", ""},
		{"on every Connection line", "Connection: X-A\nConnection: X-B, X-C\nconnection: X-D\nX-A: 1\nX-B: 2\nX-C: 3\nX-D: 4\nX-E: 5", "X-E: 5"},
		{"white space around", "Connection: \t X-A \t,\tX-B ,X-C\nX-A: 1\nX-B: 2\nX-C: 3", ""},
		{"empty members", "Connection: ,, X-A,,X-B, ,\nX-A: 1\nX-B: 2", ""},
		{"named but absent", "Connection: X-Hop\nX-End: 1", "X-End: 1"},
		{"Connection nominates itself", "Connection: Connection, X-Hop\nX-Hop: 1", ""},
		{"not a part of a name", "Connection: X\nX-Hop: 1", "X-Hop: 1"},
		{"names in other fields", "Proxy-Connection: X-Hop\nKeep-Alive: X-Hop\nX-Hop: 1", "X-Hop: 1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := fields(t, tc.in)
			removeHopByHop(h)
			if want := fields(t, tc.want); !reflect.DeepEqual(h, want) {
				t.Errorf("removeHopByHop(%q) leaves %v, want %v", tc.in, h, want)
			}
		})
	}
}

func TestPrepareRequest(t *testing.T) {
	for _, tc := range []struct {
		name, in     string
		major, minor int
		want         string
	}{
		{"upgrade", "Connection: Upgrade\nUpgrade: websocket\nAccept: a", 1, 1, "Connection: Upgrade\nUpgrade: websocket\nAccept: a"},
		{"upgrade, in other case and among others", "Connection: keep-alive, uPGRADE, X-Hop\nUpgrade: websocket\nX-Hop: 1", 1, 1, "Connection: Upgrade\nUpgrade: websocket"},
		{"upgrade, on a second line", "Connection: keep-alive\nConnection: upgrade\nUpgrade: websocket\nUpgrade: h2c", 1, 1, "Connection: Upgrade\nUpgrade: websocket"},
		{"upgrade in HTTP/1.0", "Connection: Upgrade\nUpgrade: websocket", 1, 0, ""},
		{"upgrade in HTTP/2", "Connection: Upgrade\nUpgrade: websocket", 2, 0, ""},
		{"upgrade not named in Connection", "Upgrade: websocket", 1, 1, ""},
		{"upgrade to nothing", "Connection: Upgrade", 1, 1, ""},
		{"trailers", "TE: trailers", 1, 1, "Connection: TE\nTE: trailers"},
		{"trailers, in other case", "Connection: te\nTE: Trailers", 1, 1, "Connection: TE\nTE: trailers"},
		{"trailers among codings", "TE: deflate;q=0.5, trailers\nTE: gzip", 1, 1, "Connection: TE\nTE: trailers"},
		{"trailers over HTTP/2", "TE: trailers", 2, 0, "Connection: TE\nTE: trailers"},
		{"codings only", "TE: deflate", 1, 1, ""},
		{"a coding with that prefix", "TE: trailers-not", 1, 1, ""},
		{"both", "Connection: Upgrade, TE\nUpgrade: websocket\nTE: trailers", 1, 1, "Connection: Upgrade, TE\nUpgrade: websocket\nTE: trailers"},
		{"upgrade to HTTP/2", "Connection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: x", 1, 1, ""},
		{"settings for HTTP/2 alone", "HTTP2-Settings: x", 1, 1, ""},
		{"credentials for the proxy", "Proxy-Authorization: Basic x\nAuthorization: Basic y", 1, 1, "Authorization: Basic y"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := fields(t, tc.in)
			prepareRequest(h, tc.major, tc.minor)
			if want := fields(t, tc.want); !reflect.DeepEqual(h, want) {
				t.Errorf("prepareRequest(%q, %d, %d) leaves %v, want %v", tc.in, tc.major, tc.minor, h, want)
			}
		})
	}
}

func TestViaAdd(t *testing.T) {
	for _, tc := range []struct {
		pseudonym    string
		major, minor int
		in, want     string
	}{
		{"fred", 1, 1, "", "Via: 1.1 fred"},
		{"fred", 1, 0, "", "Via: 1.0 fred"},
		{"fred", 2, 0, "", "Via: 2.0 fred"},
		{"fred", 3, 0, "", "Via: 3.0 fred"},
		{"fred", 1, 1, "Via: 1.0 ann", "Via: 1.0 ann\nVia: 1.1 fred"},
		{"fred", 1, 1, "Via: 1.0 ann, 1.1 joe\nVia: 2.0 sue", "Via: 1.0 ann, 1.1 joe\nVia: 2.0 sue\nVia: 1.1 fred"},
		{"", 1, 1, "Via: 1.0 ann", "Via: 1.0 ann"},
		{"", 1, 1, "", ""},
	} {
		v := via{}
		if tc.pseudonym != "" {
			v = newVia(tc.pseudonym)
		}
		h := fields(t, tc.in)
		v.add(h, tc.major, tc.minor)
		if want := fields(t, tc.want); !reflect.DeepEqual(h, want) {
			t.Errorf("add of %q, received as %d.%d, to %q gives %v, want %v", tc.pseudonym, tc.major, tc.minor, tc.in, h, want)
		}
	}
}

func TestViaSeen(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want bool
	}{
		{"", false},
		{"Via: 1.1 fred", true},
		{"Via: 1.0 fred", true},
		{"Via: HTTP/1.1 fred", true},
		{"Via: 1.1 FRED", true},
		{"Via: 1.1 fred (Caddy)", true},
		{"Via: \t1.1\tfred\t", true},
		{"Via: 1.0 ann, 1.1 fred", true},
		{"Via: 1.0 ann,1.1 fred,2.0 joe", true},
		{"Via: 1.0 ann (a proxy), 1.1 fred", true},
		{"Via: 1.0 ann\nVia: 1.1 fred", true},
		{"Via: 1.1 frederic", false},
		{"Via: 1.1 alfred", false},
		{"Via: 1.1 fred.example.com", false},
		{"Via: 1.1 ann (fred)", false},
		{"Via: 1.1 ann (1.1 fred)", false},
		{"Via: fred", false},
		{"Via: fred 1.1", false},
		{"Via: ,, ,", false},
		{"X-Via: 1.1 fred", false},
	} {
		if got := newVia("fred").seen(fields(t, tc.in)); got != tc.want {
			t.Errorf("seen(%q) = %v, want %v", tc.in, got, tc.want)
		}
		if (via{}).seen(fields(t, tc.in)) {
			t.Errorf("without a pseudonym: seen(%q) = true, want false", tc.in)
		}
	}
}

func TestSetForwarded(t *testing.T) {
	for _, tc := range []struct {
		name, in, peer, client string
		trusted                bool
		want                   string
	}{
		{"no field", "", "192.0.2.1", "192.0.2.1", false, "X-Forwarded-For: 192.0.2.1\nX-Real-IP: 192.0.2.1"},
		{"IPv6", "", "2001:db8::1", "2001:db8::1", false, "X-Forwarded-For: 2001:db8::1\nX-Real-IP: 2001:db8::1"},
		{"replaced for an untrusted peer", "X-Forwarded-For: 203.0.113.9\nX-Real-IP: 203.0.113.9", "192.0.2.1", "192.0.2.1", false,
			"X-Forwarded-For: 192.0.2.1\nX-Real-IP: 192.0.2.1"},
		{"appended for a trusted proxy", "X-Forwarded-For: 203.0.113.9\nX-Real-IP: 203.0.113.8", "192.0.2.1", "203.0.113.9", true,
			"X-Forwarded-For: 203.0.113.9, 192.0.2.1\nX-Real-IP: 203.0.113.9"},
		{"several lines", "X-Forwarded-For: 203.0.113.9\nX-Forwarded-For: 203.0.113.8, 203.0.113.7", "192.0.2.1", "203.0.113.9", true,
			"X-Forwarded-For: 203.0.113.9, 203.0.113.8, 203.0.113.7, 192.0.2.1\nX-Real-IP: 203.0.113.9"},
		{"a trusted proxy's own request", "", "192.0.2.1", "192.0.2.1", true, "X-Forwarded-For: 192.0.2.1\nX-Real-IP: 192.0.2.1"},
		{"no peer", "X-Forwarded-For: 203.0.113.9\nX-Real-IP: 203.0.113.9", "", "", false, ""},
		{"no peer, but trusted", "X-Forwarded-For: 203.0.113.9", "", "203.0.113.9", true, "X-Forwarded-For: 203.0.113.9\nX-Real-IP: 203.0.113.9"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := fields(t, tc.in)
			var peer, client netip.Addr
			if tc.peer != "" {
				peer = netip.MustParseAddr(tc.peer)
			}
			if tc.client != "" {
				client = netip.MustParseAddr(tc.client)
			}
			setForwarded(h, clientIdentity{addr: client, name: tc.client, peer: netip.AddrPortFrom(peer, 1234), trusted: tc.trusted})
			if want := fields(t, tc.want); !reflect.DeepEqual(h, want) {
				t.Errorf("setForwarded(%q, %v, %v, %v) gives %v, want %v", tc.in, peer, client, tc.trusted, h, want)
			}
		})
	}
}

// A client has the same name whether it is a part of the remote address or not.
func TestAddressIn(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.1:80": "192.0.2.1", "[2001:db8::1]:80": "2001:db8::1", "[2001:0db8:0::1]:80": "2001:db8::1",
		"[::ffff:192.0.2.1]:80": "192.0.2.1", "[fe80::1%eth0]:80": "fe80::1", "": "unix", "@": "unix",
	} {
		from := identifyClient(&http.Request{RemoteAddr: remote})
		if got := addressIn(remote, from.peer.Addr()); got != want {
			t.Errorf("%q: %s, want %s", remote, got, want)
		}
	}
}

func TestMaxForwards(t *testing.T) {
	for _, tc := range []struct {
		method, in string
		last       bool
		want       string
	}{
		{"TRACE", "Max-Forwards: 0", true, "Max-Forwards: 0"},
		{"OPTIONS", "Max-Forwards: 0", true, "Max-Forwards: 0"},
		{"TRACE", "Max-Forwards: 1", false, "Max-Forwards: 0"},
		{"OPTIONS", "Max-Forwards: 10", false, "Max-Forwards: 9"},
		{"TRACE", "", false, ""},
		{"GET", "Max-Forwards: 0", false, "Max-Forwards: 0"},
		{"GET", "Max-Forwards: 7", false, "Max-Forwards: 7"},
		{"TRACE", "Max-Forwards: -1", false, "Max-Forwards: -1"},
		{"TRACE", "Max-Forwards: +1", false, "Max-Forwards: +1"},
		{"TRACE", "Max-Forwards: 1.5", false, "Max-Forwards: 1.5"},
		{"TRACE", "Max-Forwards: many", false, "Max-Forwards: many"},
		{"TRACE", "Max-Forwards:", false, "Max-Forwards:"},
		{"TRACE", "Max-Forwards: 99999999999999999999", false, "Max-Forwards: 4294967294"},
		{"TRACE", "Max-Forwards: 0\nMax-Forwards: 5", false, "Max-Forwards: 0\nMax-Forwards: 5"},
	} {
		h := fields(t, tc.in)
		last := maxForwards(tc.method, h)
		if want := fields(t, tc.want); last != tc.last || !reflect.DeepEqual(h, want) {
			t.Errorf("maxForwards(%s, %q) = %v and leaves %v, want %v and %v", tc.method, tc.in, last, h, tc.last, want)
		}
	}
}

func TestValidPseudonym(t *testing.T) {
	for name, want := range map[string]bool{
		"fred": true, "F": true, "z9": true, "proxy-1.example.com": true, "off": true,
		"": false, "1fred": false, "-fred": false, "_fred": false, "@fred": false, "[fred": false,
		"fred joe": false, "fred,joe": false, "fred;a": false, "fred:80": false, "fred/1": false, `fred"`: false,
		"fred\n": false, "fréd": false, "éfred": false,
	} {
		if got := validPseudonym(name); got != want {
			t.Errorf("validPseudonym(%q) = %v, want %v", name, got, want)
		}
	}
}

func FuzzRemoveHopByHop(f *testing.F) {
	f.Add("Connection: close, X-Hop\nX-Hop: 1\nX-End: 2")
	f.Add("connection: \tx-a\t,,X-B ,\nConnection: TE, upgrade, X-C\nX-C: 3\nTE: trailers\nUpgrade: websocket\nX-A: 1\nx-b: 2")
	f.Add("Connection: Via, X-Forwarded-For, X-Real-IP, Host, Content-Length\nVia: 1.1 ann\nX-Forwarded-For: 203.0.113.9")
	f.Add("Proxy-Authorization: Basic x\nProxy-Connection: X-Hop\nX-Hop: 1\nConnection:")
	f.Fuzz(func(t *testing.T, text string) {
		before, err := readFields(text)
		if err != nil {
			return
		}
		hop := make(map[string]bool) // must be removed, in canonical form
		for name, values := range before {
			if !httpguts.ValidHeaderFieldName(name) {
				return // net/http has answered 400
			}
			if name == "Connection" {
				for _, member := range strings.Split(strings.Join(values, ","), ",") {
					hop[textproto.CanonicalMIMEHeaderKey(strings.Trim(member, " \t"))] = true
				}
			}
		}
		for _, name := range hopByHop {
			hop[name] = true
		}

		h := before.Clone()
		removeHopByHop(h)
		for name, values := range before {
			got, ok := h[name]
			switch {
			case hop[name] && ok:
				t.Errorf("%s is still there: %q", name, got)
			case !hop[name] && !slices.Equal(got, values):
				t.Errorf("%s: %q, want %q", name, got, values)
			}
		}
		if len(h) > len(before) {
			t.Errorf("there are more fields than before: %v", h)
		}

		// The fields that the proxy adds cannot be removed by Connection, and of those
		// removed only the upgrade and the trailers come back.
		h = before.Clone()
		client := netip.MustParseAddr("192.0.2.1")
		prepareRequest(h, 1, 1)
		setForwarded(h, clientIdentity{addr: client, name: "192.0.2.1", peer: netip.AddrPortFrom(client, 1234)})
		newVia("fred").add(h, 1, 1)
		for name, want := range map[string]string{"X-Forwarded-For": "192.0.2.1", "X-Real-Ip": "192.0.2.1"} {
			if got := h[name]; !slices.Equal(got, []string{want}) {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
		if got := h["Via"]; len(got) == 0 || got[len(got)-1] != "1.1 fred" {
			t.Errorf("Via: %q, want 1.1 fred at the end", got)
		}
		for name := range maps.Keys(h) {
			switch name {
			case "Via", "X-Forwarded-For", "X-Real-Ip", "Connection", "Upgrade", "Te":
			default:
				if hop[name] {
					t.Errorf("%s is still there: %q", name, h[name])
				}
			}
		}
		for option := range strings.SplitSeq(strings.Join(h["Connection"], ", "), ", ") {
			if option == "" {
				continue
			}
			if option != "Upgrade" && option != "TE" || len(h[http.CanonicalHeaderKey(option)]) == 0 {
				t.Errorf("Connection: %q names absent fields", h["Connection"])
			}
		}
	})
}
