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
