// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// rule is a rule for intermediaries: raw bytes from the client, raw bytes at a recording
// origin, and back. ORIGIN stands for the origin's address; for legibility, lines end with
// a bare \n.
type rule struct {
	name string
	rfc  string
	send string // what the client sends

	// What the origin must get: the request line, lines that are among its fields, names
	// that are not, and its body. "-" as the line means no request at all.
	line    string
	has     []string
	hasNot  []string
	content string

	answer string // the origin's response; by default 200 and "ok"

	// What the client must get: interim responses, the status, lines that are among the
	// fields, names that are not, the body and the trailers; or a response that is cut off.
	interim   []string
	status    int
	orStatus  int // if the client gets this instead, the origin must get nothing
	clientHas []string
	clientNot []string
	body      string
	trailers  []string
	brokenOff bool
	mustClose bool // the client's connection is closed afterwards
}

const ruleOK = "HTTP/1.1 200 OK\nContent-Length: 2\n\nok"

var rules = []rule{
	// RFC 9112 §3.2: request target.
	{name: "origin form", rfc: "9112 §3.2.1", send: "GET http://ORIGIN/a/b?c=d HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /a/b?c=d HTTP/1.1", has: []string{"Host: ORIGIN"}},
	{name: "no path", rfc: "9112 §3.2.1", send: "GET http://ORIGIN HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1"},
	{name: "no path but a query", rfc: "9112 §3.2.1", send: "GET http://ORIGIN?a=b HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /?a=b HTTP/1.1"},
	{name: "OPTIONS of the server", rfc: "9112 §3.2.4", send: "OPTIONS http://ORIGIN HTTP/1.1\nHost: ORIGIN\n\n", line: "OPTIONS * HTTP/1.1"},
	{name: "OPTIONS of a resource", rfc: "9112 §3.2.4", send: "OPTIONS http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "OPTIONS / HTTP/1.1"},
	{name: "the target names the host", rfc: "9112 §3.2.2", send: "GET http://ORIGIN/ HTTP/1.1\nHost: other.example\n\n", line: "GET / HTTP/1.1", has: []string{"Host: ORIGIN"}},
	{name: "braces and bars", rfc: "9110 §7.7", send: "GET http://ORIGIN/{a}|b?x={y}|z HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /{a}|b?x={y}|z HTTP/1.1"},
	{name: "encoded slash", rfc: "9110 §7.7", send: "GET http://ORIGIN/a%2fb%2Fc HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /a%2fb%2Fc HTTP/1.1"},
	{name: "double slashes", rfc: "9110 §7.7", send: "GET http://ORIGIN//a//b|c HTTP/1.1\nHost: ORIGIN\n\n", line: "GET //a//b|c HTTP/1.1"},
	{name: "dot segments", rfc: "9110 §7.7", send: "GET http://ORIGIN/a/../b/./c HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /a/../b/./c HTTP/1.1"},
	{name: "semicolons", rfc: "9110 §7.7", send: "GET http://ORIGIN/a;b?c;d&e=;f HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /a;b?c;d&e=;f HTTP/1.1"},
	{name: "raw UTF-8", rfc: "9110 §7.7", send: "GET http://ORIGIN/ü?ä HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /ü?ä HTTP/1.1"},
	{name: "empty query", rfc: "9110 §7.7", send: "GET http://ORIGIN/a? HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /a? HTTP/1.1"},
	{name: "query with question marks", rfc: "9110 §7.7", send: "GET http://ORIGIN/a?b?c=http://d/e HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /a?b?c=http://d/e HTTP/1.1"},
	{name: "encoded space and plus", rfc: "9110 §7.7", send: "GET http://ORIGIN/a%20b+c?d%20e+f HTTP/1.1\nHost: ORIGIN\n\n", line: "GET /a%20b+c?d%20e+f HTTP/1.1"},
	{name: "scheme in upper case", rfc: "9110 §4.2.3", send: "GET HTTP://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1"},

	// RFC 9110 §9: any token is a method.
	{name: "unknown method", rfc: "9110 §9.1", send: "FOO http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "FOO / HTTP/1.1"},
	{name: "method with a hyphen", rfc: "9110 §9.1", send: "M-SEARCH http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "M-SEARCH / HTTP/1.1"},
	{name: "DELETE with content", rfc: "9110 §9.3.5", send: "DELETE http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 3\n\nabc", line: "DELETE / HTTP/1.1", has: []string{"Content-Length: 3"}, content: "abc"},
	{name: "GET with content", rfc: "9110 §9.3.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 3\n\nabc", line: "GET / HTTP/1.1", has: []string{"Content-Length: 3"}, content: "abc"},
	{name: "HEAD", rfc: "9110 §9.3.2", send: "HEAD http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "HEAD / HTTP/1.1", answer: "HTTP/1.1 200 OK\nContent-Length: 1234\n\n", clientHas: []string{"Content-Length: 1234"}},

	// RFC 9112 §6: message body.
	{name: "content of known length", rfc: "9112 §6.2", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 5\n\nhello", line: "POST / HTTP/1.1", has: []string{"Content-Length: 5"}, hasNot: []string{"Transfer-Encoding"}, content: "hello"},
	{name: "content in chunks", rfc: "9112 §7.1", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n", line: "POST / HTTP/1.1", has: []string{"Transfer-Encoding: chunked"}, hasNot: []string{"Content-Length"}, content: "hello"},
	{name: "no content", rfc: "9112 §6.3", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 0\n\n", line: "POST / HTTP/1.1", has: []string{"Content-Length: 0"}, hasNot: []string{"Transfer-Encoding"}},
	{name: "length and chunks", rfc: "9112 §6.3", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 3\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n", line: "POST / HTTP/1.1", has: []string{"Transfer-Encoding: chunked"}, hasNot: []string{"Content-Length"}, content: "hello", orStatus: 400, mustClose: true},
	{name: "chunks in HTTP/1.0", rfc: "9112 §6.1", send: "POST http://ORIGIN/ HTTP/1.0\nHost: ORIGIN\nConnection: keep-alive\nTransfer-Encoding: chunked\n\n0\n\nGET http://ORIGIN/evil HTTP/1.0\nHost: ORIGIN\n\n", line: "POST / HTTP/1.1", orStatus: 400, mustClose: true},
	{name: "invalid chunks in a request", rfc: "9112 §7.1", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nTransfer-Encoding: chunked\n\n5\nhello\nzz\nGET http://ORIGIN/evil HTTP/1.1\nHost: ORIGIN\n\n", line: "-", status: 400, mustClose: true},
	{name: "contradicting lengths", rfc: "9112 §6.3", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 3\nContent-Length: 5\n\nhello", line: "-", status: 400, mustClose: true},
	{name: "unknown coding", rfc: "9112 §6.1", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nTransfer-Encoding: gzip, chunked\n\n5\nhello\n0\n\n", line: "-", status: 501, mustClose: true},

	// RFC 9110 §6.5: trailers.
	{name: "trailers of a request", rfc: "9110 §6.5", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nTrailer: X-Sum\nTransfer-Encoding: chunked\n\n5\nhello\n0\nX-Sum: 42\n\n", line: "POST / HTTP/1.1", has: []string{"Trailer: X-Sum", "trailer X-Sum: 42"}, content: "hello"},
	{name: "hop-by-hop trailers of a request", rfc: "9110 §6.5.1", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nConnection: X-One\nTrailer: X-Sum, X-One, Via, Proxy-Authorization\nTransfer-Encoding: chunked\n\n5\nhello\n0\nX-Sum: 42\nX-One: 1\nVia: 1.1 nobody\nX-Forwarded-For: 192.0.2.1\nX-Real-IP: 192.0.2.1\nProxy-Authorization: Basic eA==\nContent-Length: 5\nHost: evil\nUpgrade: x\n\n",
		line: "POST / HTTP/1.1", has: []string{"Trailer: X-Sum", "trailer X-Sum: 42"}, hasNot: []string{"trailer X-One", "trailer Via", "trailer X-Forwarded-For", "trailer X-Real-Ip", "trailer Proxy-Authorization", "trailer Content-Length", "trailer Host", "trailer Upgrade"}, content: "hello"},
	{name: "trailers of a response", rfc: "9110 §6.5", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nTE: trailers\n\n", line: "GET / HTTP/1.1", has: []string{"Te: trailers"},
		answer: "HTTP/1.1 200 OK\nTrailer: X-Sum\nTransfer-Encoding: chunked\n\n2\nok\n0\nX-Sum: 42\n\n", trailers: []string{"X-Sum: 42"}},
	{name: "unannounced trailers", rfc: "9110 §6.5", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nTE: trailers\n\n", line: "GET / HTTP/1.1",
		answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\nX-Sum: 42\n\n", trailers: []string{"X-Sum: 42"}},
	{name: "no framing in trailers", rfc: "9110 §6.5.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1",
		answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\nContent-Length: 42\n\n", trailers: []string{}},
	{name: "nominated trailers", rfc: "9110 §7.6.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1",
		answer: "HTTP/1.1 200 OK\nConnection: X-One\nTrailer: X-One, X-Two\nTransfer-Encoding: chunked\n\n2\nok\n0\nX-One: 1\nX-Two: 2\nUpgrade: x\n\n", trailers: []string{"X-Two: 2"}},
	{name: "trailers after an empty body", rfc: "9110 §6.5", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1",
		answer: "HTTP/1.1 200 OK\nTrailer: Grpc-Status\nTransfer-Encoding: chunked\n\n0\nGrpc-Status: 0\n\n", body: "-", trailers: []string{"Grpc-Status: 0"}},

	// RFC 9110 §7.6.1: connection-specific fields.
	{name: "Connection of a request", rfc: "9110 §7.6.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nConnection: X-One, keep-alive\nX-One: 1\nconnection: x-two\nX-Two: 2\nX-Three: 3\nKeep-Alive: 5\nProxy-Connection: keep-alive\n\n",
		line: "GET / HTTP/1.1", has: []string{"X-Three: 3"}, hasNot: []string{"Connection", "X-One", "X-Two", "Keep-Alive", "Proxy-Connection"}},
	{name: "Connection of a response", rfc: "9110 §7.6.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1",
		answer: "HTTP/1.1 200 OK\nConnection: X-One\nX-One: 1\nConnection: x-two\nX-Two: 2\nX-Three: 3\nKeep-Alive: 5\nContent-Length: 2\n\nok", clientHas: []string{"X-Three: 3"}, clientNot: []string{"Connection", "X-One", "X-Two", "Keep-Alive"}},
	{name: "Connection does not remove what the proxy adds", rfc: "9110 §7.6.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nConnection: Via, X-Forwarded-For, X-Real-IP, Host\n\n",
		line: "GET / HTTP/1.1", has: []string{"Via: 1.1 tester", "X-Forwarded-For: 127.0.0.1", "X-Real-Ip: 127.0.0.1", "Host: ORIGIN"}},
	{name: "credentials for the proxy", rfc: "9110 §11.7.2", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nProxy-Authorization: Basic eA==\nAuthorization: Basic eQ==\n\n",
		line: "GET / HTTP/1.1", has: []string{"Authorization: Basic eQ=="}, hasNot: []string{"Proxy-Authorization"}},
	{name: "challenges for the proxy", rfc: "9110 §11.7.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1",
		answer: "HTTP/1.1 200 OK\nProxy-Authenticate: Basic\nContent-Length: 2\n\nok", clientNot: []string{"Proxy-Authenticate"}},
	{name: "TE: trailers", rfc: "9110 §10.1.4", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nTE: trailers, deflate;q=0.5\nConnection: TE\n\n", line: "GET / HTTP/1.1", has: []string{"Te: trailers", "Connection: TE"}},

	// RFC 9110 §7.6.2: Max-Forwards.
	{name: "TRACE is forwarded", rfc: "9110 §7.6.2", send: "TRACE http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 5\n\n", line: "TRACE / HTTP/1.1", has: []string{"Max-Forwards: 4"}},
	{name: "TRACE with Max-Forwards: 0", rfc: "9110 §9.3.8", send: "TRACE http://ORIGIN/x HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 0\nCookie: secret\nX-One: 1\n\n", line: "-", clientHas: []string{"Content-Type: message/http"}, body: "TRACE http://ORIGIN/x HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 0\nX-One: 1\n\n"},
	{name: "OPTIONS is forwarded", rfc: "9110 §7.6.2", send: "OPTIONS http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 1\n\n", line: "OPTIONS / HTTP/1.1", has: []string{"Max-Forwards: 0"}},
	{name: "OPTIONS with Max-Forwards: 0", rfc: "9110 §7.6.2", send: "OPTIONS http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 0\n\n", line: "-", status: 200, body: "-", clientHas: []string{"Allow: CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, TRACE"}},
	{name: "Max-Forwards that overflows", rfc: "9110 §7.6.2", send: "OPTIONS http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 99999999999999999999\n\n", line: "OPTIONS / HTTP/1.1", has: []string{"Max-Forwards: 4294967294"}},
	{name: "Max-Forwards of other methods", rfc: "9110 §7.6.2", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 0\n\n", line: "GET / HTTP/1.1", has: []string{"Max-Forwards: 0"}},

	// RFC 9110 §7.6.3: Via.
	{name: "Via is appended", rfc: "9110 §7.6.3", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nVia: 1.0 fred\nVia: 1.1 bob\n\n", line: "GET / HTTP/1.1", has: []string{"Via: 1.0 fred", "Via: 1.1 bob", "Via: 1.1 tester"},
		answer: "HTTP/1.1 200 OK\nVia: 1.0 alice\nContent-Length: 2\n\nok", clientHas: []string{"Via: 1.0 alice", "Via: 1.1 tester"}},
	{name: "Via has the received version", rfc: "9110 §7.6.3", send: "GET http://ORIGIN/ HTTP/1.0\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", has: []string{"Via: 1.0 tester"},
		answer: "HTTP/1.0 200 OK\nContent-Length: 2\n\nok", clientHas: []string{"Via: 1.0 tester"}, mustClose: true},

	// RFC 9110 §7.7: nothing is changed, added or removed.
	{name: "nothing is added to a request", rfc: "9110 §7.7", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", hasNot: []string{"Accept-Encoding", "User-Agent", "Accept", "Content-Length", "Connection"}},
	{name: "request fields are kept", rfc: "9110 §7.7", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nAccept-Encoding: br;q=1.0, *;q=0\nUser-Agent: x\nX-Repeated: 1\nX-Repeated: 2\nX-Repeated: 3\nForwarded: for=1.2.3.4\n\n",
		line: "GET / HTTP/1.1", has: []string{"Accept-Encoding: br;q=1.0, *;q=0", "User-Agent: x", "X-Repeated: 1", "X-Repeated: 2", "X-Repeated: 3", "Forwarded: for=1.2.3.4"}},
	{name: "nothing is added to a response", rfc: "9110 §7.7", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", clientNot: []string{"Server", "Alt-Svc", "Content-Type", "Content-Encoding"}},
	{name: "response fields are kept", rfc: "9110 §7.7", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nAccept-Encoding: gzip\n\n", line: "GET / HTTP/1.1",
		answer:    "HTTP/1.1 200 OK\nServer: mine\nDate: Thu, 01 Jan 1970 00:00:00 GMT\nContent-Encoding: gzip\nSet-Cookie: a=1\nSet-Cookie: b=2, c=3\nContent-Length: 2\n\nok",
		clientHas: []string{"Server: mine", "Date: Thu, 01 Jan 1970 00:00:00 GMT", "Content-Encoding: gzip", "Set-Cookie: a=1", "Set-Cookie: b=2, c=3"}},
	{name: "a custom status", rfc: "9110 §15", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 299 Fine\nContent-Length: 2\n\nok", status: 299},

	// RFC 9110 §10.1.1 and §15.2: interim responses.
	{name: "early hints", rfc: "8297", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1",
		answer: "HTTP/1.1 103 Early Hints\nLink: </a>; rel=preload\n\nHTTP/1.1 102 Processing\n\n" + ruleOK, interim: []string{"103 Link: </a>; rel=preload Via: 1.1 tester", "102 Via: 1.1 tester"}},
	{name: "no interim response for HTTP/1.0", rfc: "9110 §15.2", send: "GET http://ORIGIN/ HTTP/1.0\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1",
		answer: "HTTP/1.1 103 Early Hints\nLink: </a>; rel=preload\n\n" + ruleOK, mustClose: true},
	{name: "expectation", rfc: "9110 §10.1.1", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nExpect: 100-continue\nContent-Length: 5\n\nhello", line: "POST / HTTP/1.1", has: []string{"Expect: 100-continue"}, content: "hello", interim: []string{"100"}},
	{name: "expectation of HTTP/1.0", rfc: "9110 §10.1.1", send: "POST http://ORIGIN/ HTTP/1.0\nHost: ORIGIN\nExpect: 100-continue\nContent-Length: 5\n\nhello", line: "POST / HTTP/1.1", hasNot: []string{"Expect"}, content: "hello", mustClose: true},
	{name: "an unknown expectation", rfc: "9110 §10.1.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nExpect: miracles\n\n", line: "-", status: 417},
	{name: "a hundred interim responses", rfc: "9110 §15.2", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: strings.Repeat("HTTP/1.1 102 Processing\n\n", 101) + ruleOK, status: 502, interim: slices.Repeat([]string{"102 Via: 1.1 tester"}, 100)},

	// RFC 9110 §15.3.5, §15.4.5: responses without content.
	{name: "204", rfc: "9110 §15.3.5", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 204 No Content\n\n", status: 204, body: "-"},
	{name: "bytes after a 204", rfc: "9112 §6.3", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 204 No Content\n\nHTTP/1.1 200 OK\nContent-Length: 4\n\nevil", status: 204, body: "-"},
	{name: "304", rfc: "9110 §15.4.5", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nIf-None-Match: \"x\"\n\n", line: "GET / HTTP/1.1", has: []string{"If-None-Match: \"x\""}, answer: "HTTP/1.1 304 Not Modified\nETag: \"x\"\n\n", status: 304, body: "-", clientHas: []string{"Etag: \"x\""}},
	{name: "a part", rfc: "9110 §14", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nRange: bytes=1-2\n\n", line: "GET / HTTP/1.1", has: []string{"Range: bytes=1-2"}, answer: "HTTP/1.1 206 Partial Content\nContent-Range: bytes 1-2/9\nContent-Length: 2\n\nok", status: 206, clientHas: []string{"Content-Range: bytes 1-2/9"}},

	// RFC 9112 §5 and §6: valid and invalid origin responses.
	{name: "chunks", rfc: "9112 §7.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n1;ext=1\no\n1\nk\n0\n\n"},
	{name: "to the end of the connection", rfc: "9112 §6.3", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.0 200 OK\n\nokCLOSE"},
	{name: "lengths that agree", rfc: "9112 §6.3", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 2, 2\n\nok", clientHas: []string{"Content-Length: 2"}},
	{name: "lengths that do not", rfc: "9112 §6.3", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 3\n\nok", status: 502},
	{name: "a length with a sign", rfc: "9112 §6.3", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nContent-Length: +2\n\nok", status: 502},
	{name: "length and coding", rfc: "9112 §6.3", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nContent-Length: 9\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n", clientHas: []string{"Content-Length: 2"}},
	{name: "an unknown coding", rfc: "9112 §6.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: gzip\n\nokCLOSE", status: 502},
	{name: "NUL in a field", rfc: "9110 §5.5", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nX-One: a\x00b\nContent-Length: 2\n\nok", status: 502},
	{name: "bare CR in a field", rfc: "9112 §2.2", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nX-One: a\rX-Two: b\nContent-Length: 2\n\nok", status: 502},
	{name: "white space before a colon", rfc: "9112 §5.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nX-One : a\nContent-Length: 2\n\nok", clientHas: []string{"X-One: a"}},
	{name: "a folded line", rfc: "9112 §5.2", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nX-One: a\n  b\nContent-Length: 2\n\nok", clientHas: []string{"X-One: a b"}},
	{name: "a line without a colon", rfc: "9112 §5.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nnonsense\nContent-Length: 2\n\nok", status: 502},
	{name: "no HTTP", rfc: "9112 §4", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "SSH-2.0-nonsense\n\n", status: 502},
	{name: "another version", rfc: "9112 §4", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/3.0 200 OK\n\n", status: 502},
	{name: "another minor version", rfc: "9110 §2.5", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.2 200 OK\nContent-Length: 2\n\nok", clientHas: []string{"Via: 1.1 tester"}},
	{name: "bare CR in the status line", rfc: "9112 §2.2", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 O\rK\nContent-Length: 2\n\nok", status: 502},
	{name: "no status", rfc: "9112 §4", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 99 Odd\n\n", status: 502},
	{name: "an unsolicited upgrade", rfc: "9110 §15.2.2", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: x\n\n", status: 502},
	{name: "Upgrade in HTTP/1.0", rfc: "9110 §7.8", send: "GET http://ORIGIN/ HTTP/1.0\nHost: ORIGIN\nConnection: Upgrade\nUpgrade: x\n\n", line: "GET / HTTP/1.1", hasNot: []string{"Upgrade", "Connection"}, mustClose: true},
	{name: "an upgrade that is declined", rfc: "9110 §7.8", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nConnection: Upgrade\nUpgrade: x\n\n", line: "GET / HTTP/1.1", has: []string{"Upgrade: x", "Connection: Upgrade"}},

	// RFC 9112 §8: incomplete messages.
	{name: "a response that ends in its head", rfc: "9112 §8", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nContent-LeCLOSE", status: 502},
	{name: "a response that ends before its length", rfc: "9112 §8", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nContent-Length: 5\n\nokCLOSE", brokenOff: true, body: "ok"},
	{name: "a response that ends in a chunk", rfc: "9112 §8", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nokCLOSE", brokenOff: true, body: "ok"},
	{name: "a response that ends before the last chunk", rfc: "9112 §8", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\nCLOSE", brokenOff: true, body: "ok"},
	{name: "a response that ends in its trailers", rfc: "9112 §8", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\nX-SumCLOSE", brokenOff: true, body: "ok"},
	{name: "an invalid chunk", rfc: "9112 §7.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\nnonsense\n", brokenOff: true, body: "ok"},
	{name: "a chunk that is longer than it says", rfc: "9112 §7.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nokX\n0\n\n", brokenOff: true, body: "ok"},
	{name: "a chunk of a negative length", rfc: "9112 §7.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n-2\nok\n0\n\n", status: 502},
	{name: "a chunk size that overflows", rfc: "9112 §7.1", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n10000000000000002\nok\n0\n\n", status: 502},
	{name: "a response that ends in a chunk, to HTTP/1.0", rfc: "9112 §8", send: "GET http://ORIGIN/ HTTP/1.0\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nokCLOSE", brokenOff: true},
	{name: "a response that is reset", rfc: "9112 §8", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.0 200 OK\n\nokRESET", brokenOff: true},

	// RFC 9112 §9: connections.
	{name: "the client closes", rfc: "9112 §9.6", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nConnection: close\n\n", line: "GET / HTTP/1.1", hasNot: []string{"Connection"}, mustClose: true},
	{name: "keep-alive of an HTTP/1.0 client", rfc: "9112 §9.3", send: "GET http://ORIGIN/ HTTP/1.0\nHost: ORIGIN\nConnection: keep-alive\n\n", line: "GET / HTTP/1.1", clientHas: []string{"Connection: close"}, mustClose: true},
	{name: "the origin closes", rfc: "9112 §9.6", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", line: "GET / HTTP/1.1", answer: "HTTP/1.1 200 OK\nConnection: close\nContent-Length: 2\n\nokCLOSE", clientNot: []string{"Connection"}},
}

// ruleOptions are options that the rules rely on.
const ruleOptions = "via tester\nresponse_header_timeout 5s\nallow 127.0.0.0/8"

func TestRules(t *testing.T) {
	for _, f := range forms {
		w := newWorld(t, ruleOptions, nil)
		if f != forms[0] {
			loadCaddyfile(t, "{\n"+f.global()+"servers {\n"+f.servers(true)+"}\n"+strings.TrimPrefix(w.globals()+f.site(t, w.site(ruleOptions)), "{\n"))
		}
		t.Run(f.name, func(t *testing.T) {
			for i, rule := range rules {
				if f.takes(i) {
					rule.test(t, func() *rawConn { return f.dialFrom(t, w.proxy, "127.0.0.1") }, newRuleOrigin)
				}
			}
		})
	}
}

// TestRulesOfNetHTTP checks the rules where net/http serves the clients.
func TestRulesOfNetHTTP(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(inRoute(w.site(ruleOptions)))
	runRules(t, w.proxy, newRuleOrigin)
}

// TestRulesBehindRequest checks the rules on connections that have served a request.
func TestRulesBehindRequest(t *testing.T) {
	w := newWorld(t, ruleOptions, nil)
	runRulesOn(t, func() *rawConn {
		c := w.dial()
		c.gets(w.origin.URL + "/")
		return c
	}, newRuleOrigin)
}

// TestRulesOverTLS checks the rules with an https origin that speaks HTTP/1.1.
func TestRulesOverTLS(t *testing.T) {
	runRules(t, newWorld(t, ruleOptions, nil).proxy, newSecureRuleOrigin)
}

func runRules(t *testing.T, proxy string, origin func(t *testing.T, answer string) *ruleOrigin) {
	runRulesOn(t, func() *rawConn { return dialRaw(t, proxy) }, origin)
}

func runRulesOn(t *testing.T, dial func() *rawConn, origin func(t *testing.T, answer string) *ruleOrigin) {
	for _, rule := range rules {
		rule.test(t, dial, origin)
	}
}

// test checks the rule on a connection to a proxy.
func (rule rule) test(t *testing.T, dial func() *rawConn, origin func(t *testing.T, answer string) *ruleOrigin) {
	t.Run(rule.name, func(t *testing.T) {
		for _, difference := range rule.run(dial(), origin(t, rule.answer), patience) {
			t.Errorf("RFC %s: %s", rule.rfc, difference)
		}
	})
}

// differences lists how a proxy's behavior differs from a rule.
type differences []string

func (d *differences) add(format string, args ...any) { *d = append(*d, fmt.Sprintf(format, args...)) }

// run sends the rule's request through a proxy to an origin that answers as the rule says.
func (rule rule) run(c *rawConn, origin *ruleOrigin, timeout time.Duration) (d differences) {
	fill := func(s string) string {
		if origin.secure {
			s = strings.NewReplacer("http://ORIGIN", "https://ORIGIN", "HTTP://ORIGIN", "HTTPS://ORIGIN").Replace(s)
		}
		return strings.ReplaceAll(s, "ORIGIN", origin.address)
	}
	c.SetDeadline(time.Now().Add(timeout))
	if _, err := io.WriteString(c, strings.ReplaceAll(fill(rule.send), "\n", "\r\n")); err != nil {
		d.add("sending the request: %v", err)
		return d
	}
	rule.checkResponse(&d, c, fill)
	rule.checkRequest(&d, origin, fill)
	return d
}

// checkResponse checks what the client got.
func (rule *rule) checkResponse(d *differences, c *rawConn, fill func(string) string) {
	method, _, _ := strings.Cut(rule.send, " ")
	var interim []string
	var res *http.Response
	for {
		var err error
		if res, err = http.ReadResponse(c.r, &http.Request{Method: method}); err != nil {
			if !rule.brokenOff || rule.body != "" { // else it was cut off before anything was passed on
				d.add("reading the response: %v", err)
			}
			return
		}
		if res.StatusCode >= 200 {
			break
		}
		line := strconv.Itoa(res.StatusCode)
		for _, name := range slices.Sorted(maps.Keys(res.Header)) {
			line += " " + name + ": " + strings.Join(res.Header[name], ", ")
		}
		interim = append(interim, line)
	}
	if !slices.Equal(interim, rule.interim) {
		d.add("interim responses %q, want %q", interim, rule.interim)
	}
	if res.StatusCode == rule.orStatus {
		rule.status, rule.line = rule.orStatus, "-"
	}
	want := rule.status
	if want == 0 {
		want = http.StatusOK
	}
	body, err := io.ReadAll(res.Body)
	if res.StatusCode != want {
		d.add("status %d, want %d (%.200q)", res.StatusCode, want, body)
		return
	}
	if rule.brokenOff {
		if err == nil {
			d.add("the response ended as if it were complete, with %q", body)
		}
		if rule.body != "" && string(body) != strings.TrimPrefix(rule.body, "-") {
			d.add("before it broke off, the body was %q, want %q", body, rule.body)
		}
		return
	}
	if err != nil {
		d.add("reading the body: %v", err)
		return
	}
	switch text := strings.ReplaceAll(string(body), "\r\n", "\n"); {
	case rule.body == "-":
		if text != "" {
			d.add("body %q, want none", text)
		}
	case rule.body != "":
		if text != fill(rule.body) {
			d.add("body %q, want %q", text, fill(rule.body))
		}
	case want == http.StatusOK && method != http.MethodHead && text != "ok":
		d.add("body %q, want %q", text, "ok")
	}
	ruleFields(d, "response", res.Header, rule.clientHas, rule.clientNot, fill)
	if rule.trailers != nil {
		ruleFields(d, "trailers", res.Trailer, rule.trailers, nil, fill)
		if len(rule.trailers) != len(res.Trailer) {
			d.add("trailers %v, want %v", res.Trailer, rule.trailers)
		}
	}
	if rule.mustClose {
		if _, err := c.r.ReadByte(); err != io.EOF {
			d.add("the connection goes on (%v)", err)
		}
	}
}

// checkRequest checks what the origin got.
func (rule rule) checkRequest(d *differences, origin *ruleOrigin, fill func(string) string) {
	got, any := origin.request()
	if rule.line == "-" {
		if any {
			d.add("the origin got %q", got.line)
		}
		return
	}
	if !any {
		d.add("the origin got nothing")
		return
	}
	if got.line != rule.line {
		d.add("request line %q, want %q", got.line, rule.line)
	}
	ruleFields(d, "request", got.fields, rule.has, rule.hasNot, fill)
	if got.content != rule.content {
		d.add("content %q, want %q", got.content, rule.content)
	}
}

func ruleFields(d *differences, what string, fields http.Header, has, hasNot []string, fill func(string) string) {
	at := make(map[string]int) // repeated fields must be in order
	for _, line := range has {
		name, value, _ := strings.Cut(fill(line), ": ")
		values := fields[textproto.CanonicalMIMEHeaderKey(name)]
		if strings.HasPrefix(name, "trailer ") {
			values = fields[name]
		}
		if i := at[name]; i >= len(values) || values[i] != value {
			d.add("%s has %s: %q, want %q as number %d", what, name, values, value, i+1)
		}
		at[name]++
	}
	for _, name := range hasNot {
		if values, ok := fields[name]; ok {
			d.add("%s has %s: %q, want none", what, name, values)
		}
	}
}

// ruleOrigin records the single request on each connection and sends fixed bytes in
// response. CLOSE at their end closes the connection, RESET resets it.
type ruleOrigin struct {
	address string
	secure  bool // over TLS
	mu      sync.Mutex
	got     []ruleRequest
}

type ruleRequest struct {
	line    string
	fields  http.Header
	content string
}

func newRuleOrigin(t *testing.T, answer string) *ruleOrigin {
	t.Helper()
	o := &ruleOrigin{}
	o.address = listen(t, func(c *net.TCPConn) { o.serve(c, c, answer) })
	return o
}

func newSecureRuleOrigin(t *testing.T, answer string) *ruleOrigin {
	t.Helper()
	o := &ruleOrigin{secure: true}
	config := &tls.Config{Certificates: []tls.Certificate{tlsCertificate}, NextProtos: []string{"http/1.1"}}
	o.address = listen(t, func(c *net.TCPConn) {
		secure := tls.Server(c, config)
		o.serve(secure, c, answer)
		_ = secure.Close()
	})
	return o
}

// serve serves one connection, whose TCP socket is socket.
func (o *ruleOrigin) serve(c net.Conn, socket *net.TCPConn, answer string) {
	if answer == "" {
		answer = ruleOK
	}
	r := bufio.NewReader(c)
	request, err := readRuleRequest(r, c)
	if err != nil {
		return
	}
	o.mu.Lock()
	o.got = append(o.got, request)
	o.mu.Unlock()
	text, reset := strings.CutSuffix(strings.ReplaceAll(answer, "\n", "\r\n"), "RESET")
	text, closed := strings.CutSuffix(text, "CLOSE")
	_, _ = io.WriteString(c, text)
	switch {
	case reset:
		_ = socket.SetLinger(0)
		_ = socket.Close()
	case closed:
	default:
		_, _ = io.Copy(io.Discard, r)
	}
}

// request returns the last request that was answered.
func (o *ruleOrigin) request() (ruleRequest, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.got) == 0 {
		return ruleRequest{}, false
	}
	return o.got[len(o.got)-1], true
}

func readRuleRequest(r *bufio.Reader, w io.Writer) (request ruleRequest, err error) {
	tp := textproto.NewReader(r)
	if request.line, err = tp.ReadLine(); err != nil {
		return request, err
	}
	fields, err := tp.ReadMIMEHeader()
	if err != nil {
		return request, err
	}
	request.fields = http.Header(fields)
	if fields.Get("Expect") == "100-continue" {
		if _, err := io.WriteString(w, "HTTP/1.1 100 Continue\r\n\r\n"); err != nil {
			return request, err
		}
	}
	var body io.Reader = strings.NewReader("")
	if n, err := strconv.Atoi(fields.Get("Content-Length")); err == nil {
		body = io.LimitReader(r, int64(n))
	}
	chunked := fields.Get("Transfer-Encoding") == "chunked"
	if chunked {
		body = httputil.NewChunkedReader(r)
	}
	content, err := io.ReadAll(body)
	if limited, ok := body.(*io.LimitedReader); ok && limited.N > 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return request, fmt.Errorf("reading the content: %w", err)
	}
	request.content = string(content)
	if chunked {
		trailers, err := tp.ReadMIMEHeader()
		if err != nil {
			return request, err
		}
		for name, values := range trailers {
			request.fields["trailer "+name] = values
		}
	}
	return request, nil
}
