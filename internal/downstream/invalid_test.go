// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bytes"
	"testing"
)

// FuzzNetHTTPRefusal checks that only a response in exactly net/http's form is replaced.
func FuzzNetHTTPRefusal(f *testing.F) {
	for _, line := range []string{"400 Bad Request", "400 Bad Request: x", "431 Request Header Fields Too Large", "200 OK"} {
		f.Add([]byte("HTTP/1.1 " + line + string(errorFields) + line))
	}
	f.Add([]byte("HTTP/1.1 417 Expectation Failed\r\nConnection: close\r\nDate: Mon, 30 Nov 2026 07:00:00 GMT\r\nContent-Length: 0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		status, _, ok := isNetHTTPRefusal(p)
		if ok && (len(status) < 3 || !bytes.HasPrefix(p, []byte("HTTP/1.1 "+status[:3]))) {
			t.Errorf("%q counts as %q", p, status)
		}
	})
}

// FuzzForeignProtocol checks that no request of HTTP/1 with a usual method counts as another protocol on a port without TLS,
// however little of it has arrived, and that no TLS record does on a port with TLS.
func FuzzForeignProtocol(f *testing.F) {
	for _, seed := range []string{"GET / HTTP/1.1\r\n", "PROXY /a HTTP/1.1\r\n", "\x16\x03\x01", "SSH-2.0-x\r\n", "PROXY UNKNOWN\r\n", "\r\n\r\n\x00\r\nQUIT\n", "\x05\x01\x00"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, first []byte) {
		if len(first) == 0 {
			return
		}
		line, _, hasLine := bytes.Cut(first, []byte("\r\n"))
		l, reason := parseRequestLine(string(line))
		isRequest := hasLine && reason == nil && (l.target[0] == '/' || bytes.Contains(line, []byte("://"))) && !bytes.HasPrefix(line, []byte("SSH-"))
		if kind, found := foreignProtocol(first, false); found && isRequest {
			t.Errorf("the request %q counts as %v", line, kind)
		}
		if kind, found := foreignProtocol(first, true); found && first[0] == 0x16 {
			t.Errorf("TLS counts as %v", kind)
		}
	})
}
