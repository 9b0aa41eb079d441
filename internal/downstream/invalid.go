// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bytes"
	"net"
	"slices"
	"strings"
	"time"
)

// Invalid describes input from a client that no handler gets to see.
type Invalid struct {
	Kind InvalidKind

	// Of Refused: the status of the response, and what is wrong, in the words of net/http if it is
	// net/http that refuses.
	Status, Detail string
	NoLine         bool // not even the request line has arrived
}

// InvalidKind classifies invalid input.
type InvalidKind int

// Kinds of invalid input.
const (
	Refused       InvalidKind = iota // a request that is malformed, too large or not supported
	LateHTTP2                        // HTTP/2 after requests of HTTP/1
	TLS                              // TLS on a port without TLS
	SOCKS4                           // SOCKS 4
	SOCKS5                           // SOCKS 5
	SSH                              // the identification of an SSH client
	ProxyProtocol                    // the header of the PROXY protocol, which nothing has read
	PlainHTTP                        // HTTP without TLS on a port with TLS
	PriorHTTP2                       // HTTP/2 without TLS, where only HTTP/1 is spoken
)

// proxyHeaders are the beginnings of the PROXY protocol's headers. The last one is what is left of the
// second version's when empty lines have been dropped.
var proxyHeaders = [][]byte{
	[]byte("PROXY TCP4 "), []byte("PROXY TCP6 "), []byte("PROXY UNKNOWN"), []byte("\r\n\r\n\x00\r\nQUIT\n"), []byte("\x00\r\nQUIT\n"),
}

// foreignProtocol recognizes a client that does not speak the protocol of the port by the first bytes
// that arrive on the connection. There must be at least one.
func foreignProtocol(first []byte, overTLS bool) (kind InvalidKind, found bool) {
	b := first[0]
	switch {
	case b == 4:
		return SOCKS4, true
	case b == 5:
		return SOCKS5, true
	case b == 0x16 && !overTLS: // a TLS handshake record
		return TLS, true
	case bytes.HasPrefix(first, []byte("SSH-")):
		return SSH, true
	case slices.ContainsFunc(proxyHeaders, func(header []byte) bool { return bytes.HasPrefix(first, header) }):
		return ProxyProtocol, true
	case overTLS && (b >= 'A' && b <= 'Z' || b >= 'a' && b <= 'z'): // a method: no TLS record starts so
		return PlainHTTP, true
	}
	return 0, false
}

// answerInvalid responds to a client that has sent something other than a request. The caller
// closes the connection in stages.
func (s *Server) answerInvalid(conn net.Conn, what Invalid) {
	if answer := s.OnInvalid(conn, what); answer != nil {
		_ = conn.SetWriteDeadline(time.Now().Add(lingerIdle))
		_, _ = conn.Write(answer)
	}
}

// net/http sends its own refusals in one write of this form. The first write of a handler's
// response never has it.
var (
	errorFields       = []byte("\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n")
	expectationFailed = []byte("417 Expectation Failed\r\nConnection: close\r\nDate: ")
	noContent         = []byte("GMT\r\nContent-Length: 0\r\n\r\n")
)

// isNetHTTPRefusal reports whether p is net/http's refusal of a request that no handler has
// seen. It returns the status, and what net/http says about the cause.
func isNetHTTPRefusal(p []byte) (status, detail string, ok bool) {
	p, found := bytes.CutPrefix(p, []byte("HTTP/1.1 "))
	if !found || len(p) == 0 || p[0] != '4' && p[0] != '5' {
		return "", "", false // the usual case: cheap
	}
	if bytes.HasPrefix(p, expectationFailed) && bytes.HasSuffix(p, noContent) && len(p) < len(expectationFailed)+len(noContent)+40 {
		return "417 Expectation Failed", "", true
	}
	line, text, found := bytes.Cut(p, errorFields)
	if !found || !bytes.Equal(line, text) && !bytes.HasPrefix(line, []byte("501 ")) {
		return "", "", false
	}
	status, detail, _ = strings.Cut(string(line), ": ")
	return status, detail, len(status) >= len("400")
}
