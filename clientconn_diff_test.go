// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
)

// twins are two proxies with the same options: the fast path serves the connections of one,
// net/http those of the other. Neither clients nor origins may be able to tell them apart.
type twins struct {
	t    testing.TB
	warm string // a request that gets a response
	each [2]twin
}

type twin struct {
	form
	proxy  string
	origin net.Listener // same port as the other twin's origin, at an address of the same length
}

const twinOptions = "via tester\nallow 127.0.0.0/8\ndeny all\nresolvers 127.0.0.1:1"

// crlf converts line ends to CRLF. ␊ stands for a bare LF.
func crlf(text string) string {
	return strings.NewReplacer("\r\n", "\r\n", "\n", "\r\n", "␊", "\n").Replace(text)
}

const warmUp = "GET http://ORIGIN/warm HTTP/1.1\nHost: ORIGIN\n\n"

func newTwins(t testing.TB, f form, options, warm string) *twins {
	t.Helper()
	w := newWorld(t, options, nil)
	other := *w
	other.proxy = freeAddress(t)
	sites := f.site(t, w.site(options+"\nzone one")) + inRoute(f.site(t, other.site(options+"\nzone two")))
	if f == forms[0] {
		w.load(sites)
	} else {
		loadCaddyfile(t, fmt.Sprintf("{\n%sservers %s {\n%s}\nservers %s {\n%s}\n%s", f.global(), w.proxy, f.servers(true), other.proxy, f.servers(false), strings.TrimPrefix(w.globals()+sites, "{\n")))
	}
	tw := &twins{t: t, warm: warm, each: [2]twin{{form: f, proxy: w.proxy}, {form: f, proxy: other.proxy}}}
	shared, err := acquireProcess()
	if err != nil {
		t.Fatal(err)
	}
	defer releaseProcess()
	for h := range shared.proxies.All() {
		for _, origins := range h.directive.origins {
			origins.Close() // the origin may be closing an idle connection, which would make the outcome random
		}
	}
	for tw.each[1].origin == nil {
		first, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		second, err := net.Listen("tcp4", strings.Replace(first.Addr().String(), "127.0.0.1", "127.0.0.2", 1))
		if err != nil {
			first.Close()
			continue
		}
		t.Cleanup(func() { first.Close(); second.Close() })
		tw.each[0].origin, tw.each[1].origin = first, second
	}
	return tw
}

// Manners of sending a text.
const (
	atOnce    = iota // as the first bytes of a connection
	bytewise         // as the first bytes, one byte at a time
	behind           // after the response to an earlier request
	pipelined        // pipelined behind an earlier request
	manners
)

// compare sends a text to both twins and returns the differences in their behavior. Where
// the proxy closes the connection while the client is still sending, the outcome depends on
// timing: only differences that occur in all of five attempts count.
func (tw *twins) compare(t testing.TB, send, answer string, manner int) (differences []string) {
	t.Helper()
	for range 5 {
		if differences = tw.compareOnce(t, send, answer, manner); len(differences) == 0 {
			return nil
		}
	}
	return differences
}

func (tw *twins) compareOnce(t testing.TB, send, answer string, manner int) (differences []string) {
	t.Helper()
	var got [2][]string
	for i := range tw.each {
		got[i] = tw.each[i].converse(t, tw.warm, send, answer, manner, i == 0)
	}
	for i := range max(len(got[0]), len(got[1])) {
		line := [2]string{"nothing", "nothing"}
		for j := range line {
			if i < len(got[j]) {
				line[j] = got[j][i]
			}
		}
		if line[0] != line[1] {
			differences = append(differences, fmt.Sprintf("%.2000q\nnet/http: %.2000q", line[0], line[1]))
		}
	}
	return differences
}

// forwardedAlone returns the requests that the origin gets by the fast path and would not get by net/http.
func (tw *twins) forwardedAlone(t testing.TB, send, answer string, manner int) (alone []string) {
	t.Helper()
	for range 5 {
		theirs := tw.each[1].converse(t, tw.warm, send, answer, manner, false)
		alone = slices.DeleteFunc(tw.each[0].converse(t, tw.warm, send, answer, manner, true), func(line string) bool {
			return !strings.HasPrefix(line, "request ") || slices.Contains(theirs, line)
		})
		if len(alone) == 0 {
			return nil
		}
	}
	return alone
}

// converse returns what the client and the origin receive in one conversation.
func (one *twin) converse(t testing.TB, warm, send, answer string, manner int, fastPath bool) []string {
	t.Helper()
	origin := newTwinOrigin(one.origin, answer)
	fill := func(s string) string { return strings.ReplaceAll(s, "ORIGIN", one.origin.Addr().String()) }
	c := one.dial(t, one.proxy)
	c.SetDeadline(time.Now().Add(patience / 2))
	c.r = bufio.NewReader(&refusalReader{r: c.peer()})
	warm, send = fill(crlf(warm)), fill(send)
	text, size := send, 1<<20
	switch manner {
	case bytewise:
		size = 1
	case behind:
		c.send(warm)
	case pipelined:
		text = warm + send
	}
	var sent <-chan struct{}
	if manner != behind {
		sent = writeInPieces(c, text, size)
	}
	if manner == behind || manner == pipelined {
		if res, body := c.response(http.MethodGet); res.StatusCode != http.StatusOK {
			t.Fatalf("the warm-up request: %s %q", res.Status, body)
		}
	}
	if manner == behind {
		expectFastPath(t, "the warm-up request", oneIf(fastPath))
		sent = writeInPieces(c, text, size)
	}
	got := one.listen(c, twinMethods(send), sent)
	c.Close()
	<-sent
	eventually(t, "the fast-path connection to close", func() bool { return fastPathConns() == 0 })
	got = append(got, origin.end()...)
	for _, names := range [][2]string{
		{"127.0.0.2", "127.0.0.1"}, {`"two";`, `"one";`}, {one.proxy, "PROXY"}, {`h3="` + strings.TrimPrefix(one.proxy, "127.0.0.1"), `h3="PROXY`},
		{"https://localhost" + strings.TrimPrefix(one.proxy, "127.0.0.1"), "https://PROXY"},
	} {
		for i, text := range got {
			got[i] = strings.ReplaceAll(text, names[0], names[1]) // strings.Replacer takes long over much text
		}
	}
	return got
}

// ownRefusal matches the proxy's response to a request that reaches no handler; net/http
// would word it differently.
var ownRefusal = regexp.MustCompile(`(?s)HTTP/1\.1 ([45]\d\d [^\r\n]*)\r\nConnection: close\r\nContent-Length: \d+\r\nContent-Type: text/plain; charset=utf-8\r\n` +
	`Proxy-Status: \S+; error=http_request_error; details="[^\r\n]*"\r\n\r\n(?:This is not a well-formed HTTP request(?:: ([^\n]*))?|This proxy does not support [^\n]*)\.\n`)

// badRequestDetail matches net/http's refusal of a malformed request with what it says is wrong.
var badRequestDetail = regexp.MustCompile(`(400 Bad Request): (?:missing|too many|malformed|invalid) [A-Za-z ]+`)

// refusalReader replaces the proxy's refusals by net/http's as it reads.
type refusalReader struct {
	r    io.Reader
	text string
}

func (r *refusalReader) Read(p []byte) (int, error) {
	if r.text == "" {
		n, err := r.r.Read(p)
		if err != nil {
			return n, err
		}
		r.text = asNetHTTPRefuses(string(p[:n]))
	}
	n := copy(p, r.text)
	r.text = r.text[n:]
	return n, nil
}

// asNetHTTPRefuses returns text with the proxy's refusals replaced by those of net/http. It drops
// what is said of malformed requests, because the proxy says more.
func asNetHTTPRefuses(text string) string {
	text = badRequestDetail.ReplaceAllString(text, "$1")
	for _, match := range ownRefusal.FindAllStringSubmatch(text, -1) {
		line, body := match[1], match[1]
		switch line[:3] {
		case "417":
			text = strings.ReplaceAll(text, match[0], "HTTP/1.1 417 Expectation Failed\r\nConnection: close\r\nDate: "+time.Now().UTC().Format(http.TimeFormat)+"\r\nContent-Length: 0\r\n\r\n")
			continue
		case "501":
			body = "Unsupported transfer encoding"
		case "505":
			line += ": unsupported protocol version"
			body = line
		}
		text = strings.ReplaceAll(text, match[0], "HTTP/1.1 "+line+"\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"+body)
	}
	return text
}

// writeInPieces writes text in the background, until all of it is written or the peer has
// closed the connection.
func writeInPieces(w io.Writer, text string, size int) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for piece := range slices.Chunk([]byte(text), size) {
			if _, err := w.Write(piece); err != nil {
				return
			}
		}
	}()
	return done
}

// listen records what the proxy sends. It half-closes once all complete requests have been
// answered.
func (one *twin) listen(c *rawConn, methods []string, sent <-chan struct{}) (got []string) {
	for _, method := range methods {
		if method == "" {
			break
		}
		got = append(got, readTwinResponse(c.r, method))
		if last := got[len(got)-1]; !strings.HasPrefix(last, "whole") {
			break
		}
	}
	<-sent
	_ = c.CloseWrite()
	rest, err := io.ReadAll(c.r)
	end := "end"
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		end = "silence"
	case errors.Is(err, io.ErrUnexpectedEOF): // TLS without its own end
		end = "cut"
	}
	rest = bytes.ReplaceAll(rest, []byte("Date: "+time.Now().UTC().Format(http.TimeFormat)), []byte("Date: now"))
	return append(got, string(rest), end)
}

// twinMethods returns the methods of the requests that net/http parses from a text, up to
// the first thing that is not a request. Requests behind a CONNECT are answered only if the
// CONNECT is refused.
func twinMethods(text string) (methods []string) {
	r := bufio.NewReader(strings.NewReader(text))
	last := ""
	for {
		if last == http.MethodPost { // net/http skips blank lines after a POST
			for peek, _ := r.Peek(1); len(peek) > 0 && (peek[0] == '\r' || peek[0] == '\n'); peek, _ = r.Peek(1) {
				_, _ = r.ReadByte()
			}
		}
		request, err := http.ReadRequest(r)
		if err != nil {
			return methods
		}
		if _, err := io.Copy(io.Discard, request.Body); err != nil {
			return methods
		}
		last = request.Method
		methods = append(methods, last)
	}
}

// readTwinResponse reads a response, interim responses included, into a normalized text:
// equivalent responses give the same text. It begins with "whole" if the response is
// complete and another may follow.
func readTwinResponse(r *bufio.Reader, method string) string {
	var text strings.Builder
	for {
		status, head, fields, err := readTwinHead(r)
		text.WriteString(head)
		if err != nil {
			return fmt.Sprintf("no response: %s: timeout %v", &text, errors.Is(err, os.ErrDeadlineExceeded))
		}
		if status == http.StatusSwitchingProtocols || method == http.MethodConnect && status == http.StatusOK {
			return "other protocol: " + text.String()
		}
		if status < 200 {
			continue
		}
		var body []byte
		coding, length := fields["Transfer-Encoding"], fields["Content-Length"]
		ends := false
		switch {
		case method == http.MethodHead || status == http.StatusNoContent || status == http.StatusNotModified:
		case coding == "chunked":
			if body, err = io.ReadAll(httputil.NewChunkedReader(r)); err == nil {
				var trailers string
				_, trailers, _, err = readTwinHead(r)
				fmt.Fprintf(&text, "trailers: %s", trailers)
			}
		case length != "":
			n, _ := strconv.Atoi(length)
			body = make([]byte, n)
			n, err = io.ReadFull(r, body)
			body = body[:n]
		default:
			// Only net/http's own error responses end with the connection. The connection
			// is reset if unread bytes remain.
			if body, err = io.ReadAll(r); errors.Is(err, syscall.ECONNRESET) {
				err = nil
			}
			ends = true
		}
		fmt.Fprintf(&text, "body: %s", body)
		switch {
		case err != nil:
			return "broken off: " + text.String()
		case ends:
			return "to the end: " + text.String()
		}
		return "whole: " + text.String()
	}
}

// readTwinHead reads a head up to the empty line. Lines that are not fields come first, the
// fields follow in sorted order.
func readTwinHead(r *bufio.Reader) (status int, head string, fields map[string]string, err error) {
	fields = make(map[string]string)
	var lines []string
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return status, strings.Join(lines, "") + line, fields, err
		}
		if line == "\r\n" {
			break
		}
		if rest, ok := strings.CutPrefix(line, "HTTP/1."); ok && len(rest) > 5 && status == 0 {
			status, _ = strconv.Atoi(rest[2:5])
			line = " " + line
		}
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\r\n"), ": ")
		if name == "Date" {
			if date, err := http.ParseTime(value); err == nil && time.Since(date).Abs() < time.Minute {
				line = "Date: now\r\n"
			}
		}
		fields[name] = value
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return status, strings.Join(lines, "") + "\r\n", fields, nil
}

// twinOrigin records the requests to a listener and answers each with the same bytes. CLOSE
// at the end of the answer closes the connection, RESET resets it. Requests for /warm get a
// fixed response and are not recorded.
type twinOrigin struct {
	ln     net.Listener
	answer string
	over   chan struct{}
	conns  sync.WaitGroup
	mu     sync.Mutex
	got    []string
}

func newTwinOrigin(ln net.Listener, answer string) *twinOrigin {
	o := &twinOrigin{ln: ln, answer: answer, over: make(chan struct{})}
	if answer == "" {
		o.answer = crlf(ruleOK)
	}
	go o.run()
	return o
}

func (o *twinOrigin) run() {
	defer close(o.over)
	for {
		conn, err := o.ln.Accept()
		if err != nil {
			return
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		var first [1]byte
		if n, _ := conn.Read(first[:]); n == 1 && first[0] == 0 { // the marker that end sends
			conn.Close()
			return
		}
		o.conns.Go(func() {
			defer conn.Close()
			o.serve(conn.(*net.TCPConn), io.MultiReader(bytes.NewReader(first[:]), conn))
		})
	}
}

func (o *twinOrigin) serve(c *net.TCPConn, from io.Reader) {
	r := bufio.NewReader(from)
	for {
		request, err := readRuleRequest(r, c)
		if err == io.EOF && request.line == "" {
			return
		}
		if strings.Contains(request.line, " /warm ") {
			_, _ = io.WriteString(c, crlf(ruleOK))
			continue
		}
		lines := []string{}
		for name, values := range request.fields {
			lines = append(lines, fmt.Sprintf("%s: %q", name, values))
		}
		slices.Sort(lines)
		o.mu.Lock()
		n := len(o.got)
		o.got = append(o.got, fmt.Sprintf("request %q %q %q %v", request.line, lines, request.content, err))
		o.mu.Unlock()
		if err != nil {
			return
		}
		if o.answer == "SILENCE" {
			continue
		}
		text, reset := strings.CutSuffix(o.answer, "RESET")
		text, closed := strings.CutSuffix(text, "CLOSE")
		_, _ = io.WriteString(c, text)
		switch {
		case reset:
			_ = c.SetLinger(0)
			return
		case closed:
			_ = c.CloseWrite()
			rest, _ := io.ReadAll(r)
			o.mu.Lock()
			o.got[n] += fmt.Sprintf(", then %q", rest)
			o.mu.Unlock()
			return
		}
	}
}

// end returns what was recorded, once no more can arrive. The origin of a test that has failed may
// still accept at the same listener, and take a marker that is not for it.
func (o *twinOrigin) end() []string {
	for {
		c, err := net.Dial("tcp4", o.ln.Addr().String())
		if err != nil {
			break
		}
		_, _ = c.Write([]byte{0})
		select {
		case <-o.over:
			c.Close()
			o.conns.Wait()
			return o.got
		case <-time.After(time.Second):
			c.Close()
		}
	}
	o.conns.Wait()
	return o.got
}

// attack is a text that a client sends on one connection, and the origin's answer.
type attack struct {
	name, send, answer string

	// better marks what the proxy deliberately handles better than net/http. Tests of their
	// own cover how.
	better bool
}

const plainGet = "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n"

var requestAttacks = []attack{
	// Request lines.
	{name: "nothing"},
	{better: true, name: "a blank line before", send: "\n" + plainGet + "\n"},
	{better: true, name: "blank lines alone", send: "\n"},
	{name: "three bytes", send: "GET"},
	{name: "four bytes", send: "GET "},
	{better: true, name: "a request and a blank line", send: plainGet + "\n\n"},
	{name: "a request line alone", send: "GET http://ORIGIN/ HTTP/1.1\n"},
	{name: "an invalid request line", send: "nonsense\n"},
	{name: "an invalid request line alone", send: "nonsense␊"},
	{name: "an invalid field, and no end", send: plainGet + "nonsense\n"},
	{name: "a folded first field, and no end", send: "GET http://ORIGIN/ HTTP/1.1\n Host: ORIGIN\n"},
	{name: "no end", send: plainGet},
	{name: "no end and half a line", send: plainGet + "X-One"},
	{name: "no field", send: "GET http://ORIGIN/ HTTP/1.1\n\n"},
	{name: "tabs", send: "GET\thttp://ORIGIN/\tHTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "two spaces", send: "GET  http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a trailing space", send: "GET http://ORIGIN/ HTTP/1.1 \nHost: ORIGIN\n\n"},
	{name: "a space in the target", send: "GET http://ORIGIN/a b HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a CR in the target", send: "GET http://ORIGIN/a\rb HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a NUL in the target", send: "GET http://ORIGIN/\x00 HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a DEL in the target", send: "GET http://ORIGIN/\x7f HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "two CR", send: "GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\r\n\r\n"},
	{name: "two CRs after the version", send: "GET http://ORIGIN/ HTTP/1.1\r\r\nHost: ORIGIN\r\n\r\n"},
	{name: "version 1.0", send: "GET http://ORIGIN/ HTTP/1.0\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "version 1.2", send: "GET http://ORIGIN/ HTTP/1.2\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "version 2.0", send: "GET http://ORIGIN/ HTTP/2.0\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "version in lower case", send: "GET http://ORIGIN/ http/1.1\nHost: ORIGIN\n\n"},
	{name: "version 01.1", send: "GET http://ORIGIN/ HTTP/01.1\nHost: ORIGIN\n\n"},
	{name: "no version", send: "GET http://ORIGIN/\nHost: ORIGIN\n\n"},
	{better: true, name: "TLS", send: "\x16\x03\x01\x00\x05hello"},

	// Methods.
	{name: "a method of 32 bytes", send: strings.Repeat("M", 32) + " http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "a method of 33 bytes", send: strings.Repeat("M", 33) + " http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "a method in lower case", send: "get http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "connect in lower case", send: "connect http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "a method that is not a token", send: "G(T http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "no method", send: " http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "HEAD", send: "HEAD http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n", answer: "HTTP/1.1 200 OK\nContent-Length: 2\n\nCLOSE"},
	{name: "HEAD of a chunked resource", send: "HEAD http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\nCLOSE"},
	{name: "HEAD of a resource with trailers", send: "HEAD http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n", answer: "HTTP/1.1 200 OK\nTrailer: X-Sum\nTransfer-Encoding: chunked\n\nCLOSE"},
	{name: "HEAD of a resource without length", send: "HEAD http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n", answer: "HTTP/1.1 200 OK\n\nCLOSE"},
	{name: "HEAD not modified", send: "HEAD http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n", answer: "HTTP/1.1 304 Not Modified\nContent-Length: 2\nContent-Type: a/b\n\nCLOSE"},
	{name: "HEAD forbidden", send: "HEAD http://10.0.0.1/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "POST without content", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "blank lines after POST without content", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n\n\n" + plainGet + "\n"},
	{name: "POST", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 2\n\nhi" + plainGet + "\n"},
	{name: "blank lines after POST", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 2\n\nhi\n\n" + plainGet + "\n" + plainGet + "\n" + plainGet + "\n"},
	{better: true, name: "POST in chunks", send: "POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nTransfer-Encoding: chunked\n\n2\nhi\n0\n\n" + plainGet + "\n"},
	{name: "OPTIONS of the proxy", send: "OPTIONS * HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "OPTIONS with Max-Forwards: 0", send: "OPTIONS http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 0\n\n" + plainGet + "\n"},
	{name: "TRACE with Max-Forwards: 0", send: "TRACE http://ORIGIN/x HTTP/1.1\nHost: other\nMax-Forwards: 0\nCookie: secret\n\n" + plainGet + "\n"},
	{name: "long TRACE with Max-Forwards: 0", send: "TRACE http://ORIGIN/" + strings.Repeat("x", 3000) + " HTTP/1.1\nHost: other\nMax-Forwards: 0\n\n" + plainGet + "\n"},

	// Targets.
	{name: "no path", send: "GET http://ORIGIN HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a fragment", send: "GET http://ORIGIN/#a HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "a fragment without a path", send: "GET http://ORIGIN#a HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a user", send: "GET http://user:pass@ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a user that looks like a host", send: "GET http://10.0.0.1\\@ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "an empty port", send: "GET http://127.0.0.1:/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "port 0", send: "GET http://127.0.0.1:0/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a port with a leading zero", send: "GET http://127.0.0.1:080/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a port above 65535", send: "GET http://127.0.0.1:65536/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "an invalid port", send: "GET http://127.0.0.1:http/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "two ports", send: "GET http://ORIGIN:80/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "nothing listens", send: "GET http://127.0.0.1:1/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "an unknown name", send: "GET http://nobody.example/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "IPv6", send: "GET http://[::1]:1/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "IPv6 with a zone", send: "GET http://[fe80::1%25lo]/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "IPv6 without brackets", send: "GET http://::1/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "unterminated IPv6", send: "GET http://[::1/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{better: true, name: "dots for a host", send: "GET http://.../ HTTP/1.1\nHost: ORIGIN\n\n"},
	{better: true, name: "dots for a host, and a port", send: "GET http://...:80/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "dots in brackets", send: "GET http://[...]:80/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "no host", send: "GET http:/// HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a port without a host", send: "GET http://:80/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a space for a host", send: "GET http://%20/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "an escape in the host", send: "GET http://a%41/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{better: true, name: "an escaped non-ASCII host", send: "GET http://a%c3%bc/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{better: true, name: "a non-ASCII host", send: "GET http://ü.example/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{better: true, name: "an invalid escape", send: "GET http://ORIGIN/%zz HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "an opaque target", send: "GET http:ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "a scheme in capitals", send: "GET HTTP://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n" + plainGet + "\n"},
	{name: "another scheme", send: "GET ftp://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "a target without a scheme", send: "GET ORIGIN HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "origin form", send: "GET / HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n" + plainGet + "\n"},
	{name: "PAC", send: "GET /pac HTTP/1.1\nHost: proxy\n\n" + plainGet + "\n" + plainGet + "\n"},
	{name: "PAC in absolute form", send: "GET http://ORIGIN/pac HTTP/1.1\nHost: proxy\n\n"},
	{name: "an ACME challenge", send: "GET http://ORIGIN/.well-known/acme-challenge/x HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "braces", send: "GET http://ORIGIN/{http.request.host} HTTP/1.1\nHost: {host}\nX-One: {env.HOME}\n\n"},

	// Host.
	{name: "no Host", send: "GET http://ORIGIN/ HTTP/1.1\nX-One: a\n\n"},
	{name: "two Host", send: plainGet + "Host: ORIGIN\n\n"},
	{name: "two Host, one in lower case", send: plainGet + "host: other\n\n"},
	{name: "an empty Host", send: "GET http://ORIGIN/ HTTP/1.1\nHost:\n\n" + plainGet + "\n"},
	{name: "another Host", send: "GET http://ORIGIN/ HTTP/1.1\nHost: other\n\n" + plainGet + "\n"},
	{name: "Host with a space", send: "GET http://ORIGIN/ HTTP/1.1\nHost: a b\n\n"},
	{name: "Host with a slash", send: "GET http://ORIGIN/ HTTP/1.1\nHost: a/b\n\n"},
	{name: "Host of dots", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ...\n\n" + plainGet + "\n"},
	{name: "a space before the colon of Host", send: "GET http://ORIGIN/ HTTP/1.1\nHost : ORIGIN\n\n"},

	// Fields.
	{better: true, name: "a folded line", send: plainGet + "X-One: a\n b\n\n" + plainGet + "\n"},
	{better: true, name: "a folded Host", send: "GET http://ORIGIN/ HTTP/1.1\nHost:\n ORIGIN\n\n"},
	{name: "a space before the first name", send: "GET http://ORIGIN/ HTTP/1.1\n X-One: a\nHost: ORIGIN\n\n"},
	{name: "a space before a colon", send: plainGet + "X-One : a\n\n"},
	{name: "a tab before a colon", send: plainGet + "Content-Length\t: 3\n\nabc"},
	{name: "no colon", send: plainGet + "X-One\n\n"},
	{name: "no name", send: plainGet + ": a\n\n"},
	{name: "an invalid name", send: plainGet + "X(One): a\n\n"},
	{name: "a name that is not ASCII", send: plainGet + "Xü: a\n\n"},
	{name: "spaces around a value", send: plainGet + "X-One: \t a b \t\n\n"},
	{name: "an empty value", send: plainGet + "X-One:\nX-Two: \n\n"},
	{name: "values that are not ASCII", send: plainGet + "X-One: \xff\xfe\nX-Two: ü\n\n"},
	{name: "NUL in a value", send: plainGet + "X-One: a\x00b\n\n"},
	{name: "DEL in a value", send: plainGet + "X-One: a\x7fb\n\n"},
	{name: "CR in a value", send: plainGet + "X-One: a\rX-Two: b\n\n"},
	{better: true, name: "LF after a value", send: plainGet + "X-One: a␊X-Two: b\n\n"},
	{better: true, name: "LF after every line", send: "GET http://ORIGIN/ HTTP/1.1␊Host: ORIGIN␊␊" + plainGet + "\n"},
	{better: true, name: "LF after the request line", send: "GET http://ORIGIN/ HTTP/1.1␊Host: ORIGIN\n\n"},
	{better: true, name: "LF for an empty line", send: plainGet + "␊" + plainGet + "\n"},
	{better: true, name: "LF before an empty line", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN␊\n"},
	{better: true, name: "LF before an empty line, and an invalid body", send: "GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN␊\nX-One: a\n\n"},
	{better: true, name: "an underscore in a name", send: plainGet + "X_One: a\n\n" + plainGet + "\n"},
	{better: true, name: "a dot in a name", send: plainGet + "X.One: a\n\n" + plainGet + "\n"},
	{better: true, name: "an underscore in the length", send: plainGet + "Content_Length: 3\n\n" + plainGet + "\n"},
	{name: "names in odd case", send: plainGet + "x-oNE: a\nX-ONE: b\nx-one: c\n\n"},
	{better: true, name: "Pragma", send: plainGet + "Pragma: no-cache\n\n" + plainGet + "\n"},
	{name: "Pragma and Cache-Control", send: plainGet + "Pragma: no-cache\nCache-Control: max-age=1\n\n"},
	{name: "another Pragma", send: plainGet + "Pragma: other\n\n"},
	{name: "Via of this proxy", send: plainGet + "Via: 1.1 tester\n\n" + plainGet + "\n"},
	{name: "X-Forwarded-For", send: plainGet + "X-Forwarded-For: 192.0.2.1\nX-Forwarded-For: 192.0.2.2\n\n"},
	{name: "two Authorization", send: plainGet + "Authorization: a\nAuthorization: b\n\n"},
	{name: "many fields", send: plainGet + strings.Repeat("X: y\n", 300) + "\n" + plainGet + "\n"},
	{name: "a long head", send: plainGet + "X-One: " + strings.Repeat("x", 20000) + "\n\n" + plainGet + "\n"},
	{name: "a head that just fits", send: plainGet + "X-One: " + strings.Repeat("x", 3900) + "\n\n" + plainGet + "\n"},
	{name: "a long name", send: plainGet + strings.Repeat("X", 5000) + ": x\n\n" + plainGet + "\n"},
	{name: "a long target", send: "GET http://ORIGIN/" + strings.Repeat("x", 9000) + " HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},

	// Content, and requests with extra demands.
	{name: "no content, by length", send: plainGet + "Content-Length: 0\n\n" + plainGet + "\n" + plainGet + "\n"},
	{name: "content of GET", send: plainGet + "Content-Length: 3\n\nabc" + plainGet + "\n"},
	{name: "a length in lower case", send: plainGet + "content-length: 3\n\nabc" + plainGet + "\n"},
	{name: "a length that hides a request", send: plainGet + "Content-Length: 45\n\n" + plainGet + "\n" + plainGet + "\n" + plainGet + "\n"},
	{name: "two lengths", send: plainGet + "Content-Length: 3\nContent-Length: 4\n\nabc"},
	{name: "a length with a sign", send: plainGet + "Content-Length: +3\n\nabc"},
	{name: "an empty length", send: plainGet + "Content-Length:\n\n" + plainGet + "\n"},
	{name: "an empty coding", send: plainGet + "Transfer-Encoding:\n\n" + plainGet + "\n"},
	{better: true, name: "chunks", send: plainGet + "Transfer-Encoding: chunked\n\n3\nabc\n0\n\n" + plainGet + "\n"},
	{better: true, name: "chunks in capitals", send: plainGet + "TRANSFER-ENCODING: CHUNKED\n\n0\n\n" + plainGet + "\n"},
	{name: "identity", send: plainGet + "Transfer-Encoding: identity\n\n" + plainGet + "\n"},
	{better: true, name: "length and chunks", send: plainGet + "Content-Length: 3\nTransfer-Encoding: chunked\n\n0\n\n" + plainGet + "\n"},
	{name: "Expect", send: plainGet + "Expect: 100-continue\n\n" + plainGet + "\n"},
	{name: "another Expect", send: plainGet + "Expect: miracles\n\n" + plainGet + "\n"},
	{name: "an empty Expect", send: plainGet + "Expect:\n\n" + plainGet + "\n"},
	{name: "Trailer", send: plainGet + "Trailer: X-Sum\n\n" + plainGet + "\n"},
	{name: "TE", send: plainGet + "TE: trailers\nConnection: TE\n\n" + plainGet + "\n"},
	{name: "close", send: plainGet + "Connection: close\n\n" + plainGet + "\n"},
	{name: "close in capitals", send: plainGet + "Connection: Keep-Alive, CLOSE\n\n" + plainGet + "\n"},
	{name: "close in the second field", send: plainGet + "Connection: keep-alive\nConnection: close\n\n" + plainGet + "\n"},
	{name: "close after a space", send: plainGet + "Connection: keep-alive close\n\n" + plainGet + "\n"},
	{name: "close after a tab", send: plainGet + "Connection: a\tclose\n\n" + plainGet + "\n"},
	{name: "close as part of a word", send: plainGet + "Connection: closed, foreclose\n\n" + plainGet + "\n"},
	{name: "close with a parameter", send: plainGet + "Connection: close;x\n\n" + plainGet + "\n"},
	{name: "an empty Connection", send: plainGet + "Connection: , ,\n\n" + plainGet + "\n"},
	{name: "Proxy-Connection", send: plainGet + "Proxy-Connection: close\n\n" + plainGet + "\n"},
	{name: "fields named in Connection", send: plainGet + "Connection: X-One, Host, Via\nX-One: a\n\n" + plainGet + "\n"},
	{name: "an upgrade that is declined", send: plainGet + "Connection: Upgrade\nUpgrade: websocket\n\n" + plainGet + "\n"},
	{name: "an upgrade without Connection: Upgrade", send: plainGet + "Upgrade: websocket\n\n" + plainGet + "\n"},
	{name: "an upgrade to HTTP/2", send: plainGet + "Connection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAAQAAP__\n\n" + plainGet + "\n"},
	{name: "an upgrade", send: plainGet + "Connection: Upgrade\nUpgrade: x\n\nearly", answer: "HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: x\n\nlateCLOSE"},
	{name: "an unsolicited upgrade", send: plainGet + "\n" + plainGet + "\n", answer: "HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: x\n\nCLOSE"},
	{name: "CONNECT", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT and early data", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT and much early data", send: plainGet + "\nCONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\n\nPOST /in HTTP/1.1\nHost: ORIGIN\nContent-Length: 20000\n\n" + strings.Repeat("x", 20000)},
	{name: "CONNECT to a denied address", send: "CONNECT 10.0.0.1:443 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a URL", send: "CONNECT http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT without a port", send: "CONNECT 127.0.0.1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to an empty port", send: "CONNECT 127.0.0.1: HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to port 0", send: "CONNECT 127.0.0.1:0 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a port above 65535", send: "CONNECT 127.0.0.1:65536 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to a port with a sign", send: "CONNECT 127.0.0.1:+1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to an invalid port", send: "CONNECT 127.0.0.1:http HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT where nothing listens", send: "CONNECT 127.0.0.1:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to an unknown name", send: "CONNECT nobody.example:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a name with an underscore", send: "CONNECT _a.example:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a name with a trailing dot", send: "CONNECT nobody.example.:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to dots", send: "CONNECT ...:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a name of digits", send: "CONNECT 2130706433:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to IPv6", send: "CONNECT [::1]:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to IPv6 without brackets", send: "CONNECT ::1:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to IPv6 with a zone", send: "CONNECT [::1%25lo]:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to IPv6 with a bare zone", send: "CONNECT [::1%lo]:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to unterminated IPv6", send: "CONNECT [::1:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to IPv6 and more", send: "CONNECT [::1]x:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to IPv4 in IPv6", send: "CONNECT [::ffff:127.0.0.1]:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to IPv4 in brackets", send: "CONNECT [127.0.0.1]:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to empty brackets", send: "CONNECT []:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to trailing brackets", send: "CONNECT :1[::1] HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a port without a host", send: "CONNECT :80 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a user", send: "CONNECT user@ORIGIN HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a path alone", send: "CONNECT ORIGIN/a HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a query", send: "CONNECT ORIGIN?a HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to a fragment", send: "CONNECT ORIGIN#a HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to an escape", send: "CONNECT %31:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to non-ASCII", send: "CONNECT ü.example:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a comma", send: "CONNECT a,b:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to braces", send: "CONNECT {http.request.host}:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a star", send: "CONNECT *:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to a backslash", send: "CONNECT a\\b:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{better: true, name: "CONNECT to quotes", send: "CONNECT \"a\":1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT to a long name", send: "CONNECT " + strings.Repeat("a.", 126) + "example:1 HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},
	{name: "CONNECT of HTTP/1.0", send: "CONNECT ORIGIN HTTP/1.0\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT with a length", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nContent-Length: 0\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT with content", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nContent-Length: 2\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT in chunks", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nTransfer-Encoding: chunked\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT with an expectation", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nExpect: 100-continue\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT with an upgrade", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nConnection: Upgrade\nUpgrade: x\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT to be closed", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nConnection: close\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT to be kept alive", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nConnection: keep-alive\nProxy-Connection: keep-alive\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT and another Host", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nX: y\nHost: b\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{better: true, name: "CONNECT without Host", send: "CONNECT ORIGIN HTTP/1.1\n\nGET /in HTTP/1.1\nHost: ORIGIN\n\n"},
	{name: "CONNECT that loops", send: "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nVia: 1.1 tester\n\n" + plainGet + "\n"},
	{name: "CONNECT to a path alone", send: "CONNECT / HTTP/1.1\nHost: ORIGIN\n\n" + plainGet + "\n"},

	// Several requests on one connection.
	{name: "many at once", send: strings.Repeat(plainGet+"\n", 50)},
	{name: "many long ones at once", send: strings.Repeat(plainGet+"X-One: "+strings.Repeat("x", 1500)+"\n\n", 20)},
	{name: "one of each", send: plainGet + "\nPOST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 2\n\nhi" + plainGet + "\n" + plainGet + "\n" + plainGet + "\nGET /pac HTTP/1.1\nHost: x\n\n" + plainGet + "\nnonsense\n\n"},
	{name: "nonsense after a request", send: plainGet + "\n" + plainGet + "\nnonsense\n\n"},
	{name: "refusals and answers", send: strings.Repeat("GET http://10.0.0.1/ HTTP/1.1\nHost: x\n\n"+plainGet+"\n", 3)},
}

var responseAttacks = []attack{
	{name: "nothing", answer: "CLOSE"},
	{name: "no content", answer: "HTTP/1.1 204 No Content\nContent-Length: 5\nContent-Type: a/b\n\nCLOSE"},
	{name: "no content, and trailers", answer: "HTTP/1.1 204 No Content\nTrailer: X-Sum\n\nCLOSE"},
	{name: "not modified", answer: "HTTP/1.1 304 Not Modified\nContent-Length: 5\nContent-Type: a/b\nETag: x\n\nCLOSE"},
	{name: "not modified, and chunks", answer: "HTTP/1.1 304 Not Modified\nTransfer-Encoding: chunked\n\nCLOSE"},
	{name: "reset content", answer: "HTTP/1.1 205 Reset Content\nContent-Length: 0\n\nCLOSE"},
	{name: "reset content without a length", answer: "HTTP/1.1 205 Reset Content\n\nCLOSE"},
	{name: "length 0", answer: "HTTP/1.1 200 OK\nContent-Length: 0\n\nCLOSE"},
	{name: "longer than its length", answer: "HTTP/1.1 200 OK\nContent-Length: 2\n\nokayCLOSE"},
	{name: "shorter than its length", answer: "HTTP/1.1 200 OK\nContent-Length: 5\n\nokCLOSE"},
	{name: "a length without content", answer: "HTTP/1.1 200 OK\nContent-Length: 5\n\nCLOSE"},
	{name: "reset before its length", answer: "HTTP/1.1 200 OK\nContent-Length: 5\n\nokRESET"},
	{better: true, name: "chunks", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n3\nay!\n0\n\nCLOSE"},
	{name: "no chunks", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n0\n\nCLOSE"},
	{name: "truncated chunks", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nokCLOSE"},
	{name: "chunks without the last chunk", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\nCLOSE"},
	{name: "invalid chunks", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\nnonsense\n\nCLOSE"},
	{name: "chunks and no trailers", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nTrailer: X-Sum\n\n2\nok\n0\n\nCLOSE"},
	{name: "trailers", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nTrailer: X-Sum, X-Two\n\n2\nok\n0\nX-Sum: 1\nX-Sum: 2\nX-Two: 3\n\nCLOSE"},
	{name: "unannounced trailers", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\nX-Sum: 1\n\nCLOSE"},
	{name: "some unannounced trailers", answer: "HTTP/1.1 200 OK\nTrailer: X-One\nTransfer-Encoding: chunked\n\n2\nok\n0\nX-One: 1\nX-Two: 2\n\nCLOSE"},
	{name: "invalid trailers", answer: "HTTP/1.1 200 OK\nTrailer: Content-Length, Host, Trailer\nTransfer-Encoding: chunked\n\n2\nok\n0\nContent-Length: 1\nHost: x\nTrailer: y\n\nCLOSE"},
	{name: "trailers that are fields", answer: "HTTP/1.1 200 OK\nTrailer: X-One\nX-One: before\nTransfer-Encoding: chunked\n\n2\nok\n0\nX-One: behind\n\nCLOSE"},
	{name: "announced trailers that are missing", answer: "HTTP/1.1 200 OK\nTrailer: X-One\nX-One: before\nTransfer-Encoding: chunked\n\n2\nok\n0\n\nCLOSE"},
	{name: "trailers and no chunk", answer: "HTTP/1.1 200 OK\nTrailer: X-Sum\nTransfer-Encoding: chunked\n\n0\nX-Sum: 1\n\nCLOSE"},
	{name: "Trailer and a length", answer: "HTTP/1.1 200 OK\nTrailer: X-Sum\nContent-Length: 2\n\nokCLOSE"},
	{name: "to the end", answer: "HTTP/1.1 200 OK\n\nokCLOSE"},
	{name: "nothing to the end", answer: "HTTP/1.1 200 OK\n\nCLOSE"},
	{name: "to the reset", answer: "HTTP/1.1 200 OK\n\nokRESET"},
	{name: "HTTP/1.0", answer: "HTTP/1.0 200 OK\nContent-Length: 2\n\nokCLOSE"},
	{name: "interim", answer: "HTTP/1.1 103 Early Hints\nLink: a\nContent-Length: 3\nDate: x\n\nHTTP/1.1 100 Continue\n\nHTTP/1.1 199 Odd\n\n" + ruleOK + "CLOSE"},
	{name: "endless interim responses", answer: strings.Repeat("HTTP/1.1 102 Processing\n\n", 101) + ruleOK + "CLOSE"},
	{name: "interim alone", answer: "HTTP/1.1 103 Early Hints\nLink: a\n\nCLOSE"},
	{name: "an odd status", answer: "HTTP/1.1 299 Fine\nContent-Length: 2\n\nokCLOSE"},
	{name: "an odder status", answer: "HTTP/1.1 999 Fine\nContent-Length: 2\n\nokCLOSE"},
	{name: "a custom reason", answer: "HTTP/1.1 404 Gone fishing\nContent-Length: 2\n\nokCLOSE"},
	{name: "an invalid status", answer: "HTTP/1.1 1000 Fine\n\nCLOSE"},
	{name: "no HTTP", answer: "SSH-2.0\nCLOSE"},
	{name: "a date", answer: "HTTP/1.1 200 OK\nDate: yesterday\nContent-Length: 2\n\nokCLOSE"},
	{name: "close", answer: "HTTP/1.1 200 OK\nConnection: close\nContent-Length: 2\n\nokCLOSE"},
	{name: "all of Caddy's fields", answer: "HTTP/1.1 200 OK\nServer: mine\nAlt-Svc: x\nContent-Type: a/b\nContent-Length: 2\n\nokCLOSE"},
	{name: "an empty type", answer: "HTTP/1.1 200 OK\nContent-Type:\nContent-Length: 2\n\nokCLOSE"},
	{name: "spaces and what is not ASCII", answer: "HTTP/1.1 200 OK\nX-One: \t a \xff \nContent-Length: 2\n\nokCLOSE"},
	{name: "fields many times", answer: "HTTP/1.1 200 OK\n" + strings.Repeat("Set-Cookie: a\nx-y: b\n", 30) + "Content-Length: 2\n\nokCLOSE"},
	{name: "CONNECT's answer", answer: "HTTP/1.1 200 Connection Established\n\nCLOSE"},
	{name: "407", answer: "HTTP/1.1 407 Proxy Authentication Required\nProxy-Authenticate: Basic\nContent-Length: 2\n\nokCLOSE"},
	{name: "2048 bytes to the end", answer: "HTTP/1.1 200 OK\n\n" + strings.Repeat("x", 2048) + "CLOSE"},
	{name: "3000 bytes to the end", answer: "HTTP/1.1 200 OK\n\n" + strings.Repeat("x", 3000) + "CLOSE"},
	{name: "3000 bytes", answer: "HTTP/1.1 200 OK\nContent-Length: 3000\n\n" + strings.Repeat("x", 3000) + "CLOSE"},
	{name: "much to the end", answer: "HTTP/1.1 200 OK\n\n" + strings.Repeat("0123456789", 300_000) + "CLOSE"},
	{name: "much in chunks", answer: "HTTP/1.1 200 OK\nTrailer: X-Sum\nTransfer-Encoding: chunked\n\n" + strings.Repeat("a\n0123456789\n", 100_000) + "0\nX-Sum: 1\n\nCLOSE"},
	{name: "much", answer: "HTTP/1.1 200 OK\nContent-Length: 3000000\n\n" + strings.Repeat("0123456789", 300_000) + "CLOSE"},
	{name: "much, and beyond its length", answer: "HTTP/1.1 200 OK\nContent-Length: 3000000\n\n" + strings.Repeat("0123456789", 300_001) + "CLOSE"},
	{name: "much, and below its length", answer: "HTTP/1.1 200 OK\nContent-Length: 3000001\n\n" + strings.Repeat("0123456789", 300_000) + "CLOSE"},
	{name: "a large head", answer: "HTTP/1.1 200 OK\nX-One: " + strings.Repeat("x", 60_000) + "\nContent-Length: 2\n\nokCLOSE"},
}

// TestClientConnRequests checks that the fast path and net/http understand requests alike.
func TestClientConnRequests(t *testing.T) {
	attacks := requestAttacks
	for _, rule := range rules {
		// Behind chunks, net/http's connections end.
		send := strings.ReplaceAll(rule.send, "Transfer-Encoding: chunked\n", "Transfer-Encoding: chunked\nConnection: close\n")
		attacks = append(attacks, attack{name: rule.name + ", a rule", send: send, answer: rule.answer, better: rule.orStatus != 0})
	}
	for _, f := range forms {
		tw := newTwins(t, f, twinOptions+"\nserve_pac /pac", warmUp)
		for i, a := range attacks {
			if a.better || !f.takes(i) {
				continue
			}
			t.Run(f.name+"/"+a.name, func(t *testing.T) {
				for manner := range manners {
					for _, difference := range tw.compare(t, crlf(a.send), crlf(a.answer), manner) {
						t.Errorf("in manner %d: %s", manner, difference)
					}
				}
			})
		}
	}
}

// TestClientConnResponses checks that both pass responses on alike.
func TestClientConnResponses(t *testing.T) {
	for _, f := range forms {
		tw := newTwins(t, f, twinOptions, warmUp)
		for i, a := range responseAttacks {
			if !f.takes(i) {
				continue
			}
			t.Run(f.name+"/"+a.name, func(t *testing.T) {
				for _, difference := range tw.compare(t, crlf(plainGet+"\n"+plainGet+"\n"), crlf(a.answer), behind) {
					t.Error(difference)
				}
			})
		}
	}
}

// TestClientConnRefusals checks that both send the same local replies.
func TestClientConnRefusals(t *testing.T) {
	credentials := "Proxy-Authorization: Basic YWxpY2U6d29uZGVybGFuZA==\n" // alice:wonderland
	for i, refusals := range []struct {
		options, warm string
		attacks       []attack
	}{
		{authUsers, "GET http://ORIGIN/warm HTTP/1.1\nHost: ORIGIN\n" + credentials + "\n", []attack{
			{name: "no credentials", send: plainGet + "\n" + plainGet + "\n"},
			{name: "no credentials, then some", send: plainGet + "\n" + plainGet + credentials + "\n"},
			{name: "wrong credentials", send: plainGet + "Proxy-Authorization: Basic eDp5\n\n" + plainGet + credentials + "\n"},
			{name: "invalid credentials", send: plainGet + "Proxy-Authorization: Basic !\n\n"},
			{name: "credentials twice", send: plainGet + credentials + credentials + "\n"},
			{name: "no credentials, for HEAD", send: "HEAD http://ORIGIN/ HTTP/1.1\nHost: x\n\n" + plainGet + "\n"},
			{name: "no credentials, for CONNECT", send: "CONNECT ORIGIN HTTP/1.1\nHost: x\n\n" + plainGet + "\n"},
		}},
		{"burst 3\nrefill 0.0001", warmUp, []attack{{name: "too many", send: strings.Repeat(plainGet+"\n", 5) + "HEAD http://ORIGIN/ HTTP/1.1\nHost: x\n\n" + plainGet + "\n"}}},
		{"response_header_timeout 200ms", warmUp, []attack{{name: "silence", send: plainGet + "\n" + plainGet + "\n", answer: "SILENCE"}}},
		{"header_down X-One \" {http.request.method} \"\nheader_down -Via\nheader_up Host other\nheader_up X-Two {http.request.uri}", warmUp, []attack{
			{name: "changed fields", send: plainGet + "\n" + plainGet + "X-Two: b\n\n"},
		}},
	} {
		for _, f := range forms {
			if !f.takes(i) {
				continue
			}
			tw := newTwins(t, f, twinOptions+"\n"+refusals.options, refusals.warm)
			for _, a := range refusals.attacks {
				t.Run(f.name+"/"+a.name, func(t *testing.T) {
					for _, difference := range tw.compare(t, crlf(a.send), crlf(a.answer), behind) {
						t.Error(difference)
					}
				})
			}
		}
	}
}

// TestClientConnHandOffRequests checks which requests the fast path hands to net/http, and that
// HTTP/2 never begins behind other requests on a connection.
func TestClientConnHandOffRequests(t *testing.T) {
	tw := newTwins(t, forms[0], twinOptions, warmUp)
	one := tw.each[0]
	origin := newTwinOrigin(one.origin, "")
	defer origin.end()
	fastConn := func() *rawConn {
		c := dialRaw(t, one.proxy)
		c.send(strings.ReplaceAll(warmUp, "ORIGIN", one.origin.Addr().String()))
		c.response(http.MethodGet)
		if fastPathConns() == 0 {
			t.Fatal("the connection is not on the fast path")
		}
		return c
	}
	for _, path := range []string{"acme-challenge/x", "pki-validation/x"} { // Caddy's own handlers, while it waits for a challenge
		c := fastConn()
		c.send(strings.ReplaceAll("GET http://ORIGIN/.well-known/"+path+" HTTP/1.1\nHost: ORIGIN\n\n", "ORIGIN", one.origin.Addr().String()))
		c.response(http.MethodGet)
		eventually(t, path+" to be handed to net/http", func() bool { return fastPathConns() == 0 })
	}
	for _, text := range []string{"BAD /x\n\n", "nonsense of some length\n", plainGet + "nonsense\n", plainGet + " folded\n\n"} { // refused immediately
		c := fastConn()
		c.send(strings.ReplaceAll(text, "ORIGIN", one.origin.Addr().String()))
		if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusBadRequest {
			t.Errorf("%q: got %s", text, res.Status)
		}
	}
	c := fastConn()
	c.send("PRI * HTTP/2.0\n\nSM\n\n")
	if got := c.readAll(); !strings.HasPrefix(got, "HTTP/1.1 400 ") || !strings.HasSuffix(got, "HTTP/2 cannot start after HTTP/1 requests on the same connection.\n") {
		t.Errorf("HTTP/2 behind another request: got %q", got)
	}
}

// TestClientConnWriter checks that responses are byte for byte those of net/http, for
// handlers that set a Content-Type, write no content for HEAD, and change no fields between
// WriteHeader and a flush.
func TestClientConnWriter(t *testing.T) {
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		t.Run(method, func(t *testing.T) { clientConnWriterOf(t, method) })
	}
}

func clientConnWriterOf(t *testing.T, method string) {
	write := func(w http.ResponseWriter, size int) error {
		if method == http.MethodHead {
			return http.ErrBodyNotAllowed
		}
		_, err := io.WriteString(w, strings.Repeat("x", size))
		return err
	}
	flush := func(w http.ResponseWriter) { _ = http.NewResponseController(w).Flush() }
	for name, handle := range map[string]func(w http.ResponseWriter){
		"nothing":                 func(w http.ResponseWriter) {},
		"a status":                func(w http.ResponseWriter) { w.WriteHeader(404) },
		"two":                     func(w http.ResponseWriter) { w.WriteHeader(404); w.WriteHeader(200) },
		"a flush":                 flush,
		"content":                 func(w http.ResponseWriter) { write(w, 5) },
		"a flush before content":  func(w http.ResponseWriter) { flush(w); write(w, 5) },
		"a flush behind content":  func(w http.ResponseWriter) { write(w, 5); flush(w) },
		"a flush in content":      func(w http.ResponseWriter) { write(w, 5); flush(w); flush(w); write(w, 5) },
		"what fits":               func(w http.ResponseWriter) { write(w, 2048) },
		"what does not":           func(w http.ResponseWriter) { write(w, 2049) },
		"what fits, in parts":     func(w http.ResponseWriter) { write(w, 1024); write(w, 1024) },
		"what does not, in parts": func(w http.ResponseWriter) { write(w, 1024); write(w, 1025); write(w, 5) },
		"much":                    func(w http.ResponseWriter) { write(w, 10_000); write(w, 100_000) },
		"a length":                func(w http.ResponseWriter) { w.Header()["Content-Length"] = []string{"5"}; write(w, 5) },
		"a length, flushed":       func(w http.ResponseWriter) { w.Header()["Content-Length"] = []string{"5"}; flush(w); write(w, 5) },
		"shorter than its length": func(w http.ResponseWriter) { w.Header()["Content-Length"] = []string{"5"}; flush(w); write(w, 2) },
		"longer than its length": func(w http.ResponseWriter) {
			w.Header()["Content-Length"] = []string{"5"}
			write(w, 5)
			flush(w)
			write(w, 1)
		},
		"a type and a length of 304": func(w http.ResponseWriter) { w.Header()["Content-Length"] = []string{"5"}; w.WriteHeader(304) },
		"content of 304": func(w http.ResponseWriter) {
			w.WriteHeader(304)
			if err := write(w, 5); err != http.ErrBodyNotAllowed {
				t.Errorf("writing to 304: %v", err)
			}
		},
		"close":      func(w http.ResponseWriter) { w.Header()["Connection"] = []string{"close"}; write(w, 5) },
		"keep-alive": func(w http.ResponseWriter) { w.Header()["Connection"] = []string{"keep-alive"}; write(w, 5) },
		"no date":    func(w http.ResponseWriter) { w.Header()["Date"] = nil; write(w, 5) },
		"odd values": func(w http.ResponseWriter) {
			w.Header()["X-One"] = []string{" a\r\nX-Two: b ", "", "\t c\t"}
			w.Header()["X(Three)"] = []string{"d"}
		},
		"interim responses": func(w http.ResponseWriter) {
			w.Header()["Content-Length"], w.Header()["X-One"] = []string{"3"}, []string{"a"}
			w.WriteHeader(103)
			w.WriteHeader(102)
			w.Header()["Content-Length"] = []string{"5"}
			write(w, 5)
		},
		"trailers": func(w http.ResponseWriter) {
			w.Header()["Trailer"] = []string{"x-one,X-Two ", "", "X-Three"}
			write(w, 5)
			flush(w)
			w.Header()["X-One"], w.Header()["X-Three"], w.Header()["X-Four"] = []string{"a", "b"}, []string{"c"}, []string{"d"}
		},
		"unannounced trailers": func(w http.ResponseWriter) {
			flush(w)
			w.Header()[http.TrailerPrefix+"X-One"] = []string{"a"}
		},
		"trailers that are known before": func(w http.ResponseWriter) {
			w.Header()[http.TrailerPrefix+"X-One"] = []string{"a"}
			write(w, 5)
		},
	} {
		t.Run(name, func(t *testing.T) {
			handler := func(w http.ResponseWriter, r *http.Request) {
				w.Header()["Content-Type"] = nil
				handle(w)
			}
			server := httptest.NewServer(http.HandlerFunc(handler))
			defer server.Close()
			want := dialRaw(t, server.Listener.Addr().String())
			want.send(strings.Repeat(method+" / HTTP/1.1\nHost: x\n\n", 2))
			got := dialRaw(t, serveBelow(t, handler))
			got.send(strings.Repeat(method+" http://x/ HTTP/1.1\nHost: x\n\n", 2))
			for range 2 {
				if is, want := readTwinResponse(got.r, method), readTwinResponse(want.r, method); is != want {
					t.Errorf("%.2000q\nnet/http: %.2000q", is, want)
				}
			}
		})
	}
}

// serveBelow serves clients with a handler below net/http, and returns the address.
func serveBelow(t *testing.T, handle http.HandlerFunc) string {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	below := downstream.Listen(ln, &downstream.Server{
		Handle: handle, BaseContext: context.Background(),
		Listeners: new(downstream.Listeners), Lingering: new(downstream.Lingering),
		Successor: successorListener,
		Exiting:   func() bool { return true },
		OnEnd:     func(net.Conn) {},
	})
	t.Cleanup(func() { below.Close() })
	return ln.Addr().String()
}

// mayBeBetter matches what the proxy may deliberately handle better than net/http: a % that
// begins no escape, field names with _ or . in them, empty lines before requests, CONNECT
// targets that are no authorities, other protocols, lines that do not end with CRLF or are folded,
// Pragma, long methods, and hosts that Caddy refuses.
var mayBeBetter = regexp.MustCompile(`%(?:[^0-9A-Fa-f]|.?$|.[^0-9A-Fa-f])|(?m:^[^: ]*[_.][^: ]*:)|^\r|\r\n\r\n\r|CONNECT [^ ]*[^-A-Za-z0-9.:_ \[\]]|CONNECT (?:[^ ]*:[^ ]*){2}|CONNECT [^ ]*:[^ ]*[^0-9 ]|CONNECT [^ ]*\[|^[\x04\x05\x16]|` +
	`(?:^|[^\r])\n|\n[ \t]|(?i:pragma)|(?m:^[^ ]{33})|(?:://|CONNECT )[^/ ]*(?:\.\.|[^-A-Za-z0-9.:_@\[\]/ ]|[./:]\.)`)

// endsAfterChunks adds Connection: close to requests with chunks, behind which net/http's
// connections end. It reports false for framing that net/http accepts and the proxy refuses.
func endsAfterChunks(send []byte) ([]byte, bool) {
	coded := transferEncoding.Match(send)
	if coded && (contentLengths.Match(send) || bytes.Contains(send, []byte("HTTP/1.0"))) {
		return nil, false
	}
	return transferEncoding.ReplaceAll(send, []byte("${1}Connection: close\r\n")), true
}

var (
	transferEncoding = regexp.MustCompile(`(?i)(\ntransfer-encoding:[^\n]*\n)`)
	contentLengths   = regexp.MustCompile(`(?i)\ncontent-length:`)
)

// FuzzClientConn checks that origins get no request by the fast path that they would not get by net/http,
// whatever clients and origins send. The fast path may refuse more, and in other words: TestClientConnRefusals
// has those differences.
func FuzzClientConn(f *testing.F) { fuzzClientConn(f, forms[0]) }

// FuzzClientConnTLS is FuzzClientConn with TLS and the PROXY protocol.
func FuzzClientConnTLS(f *testing.F) { fuzzClientConn(f, forms[3]) }

// fuzzSeeds is how many of the seeds a run of a fuzz target begins with. Go runs them all before it
// changes any of them, and each takes it some 100 ms, because it copies the coverage of all packages.
const fuzzSeeds = 20

func fuzzClientConn(f *testing.F, in form) {
	var seeds [][2]string
	for _, rule := range rules {
		if rule.orStatus == 0 {
			seeds = append(seeds, [2]string{rule.send, rule.answer})
		}
	}
	for _, attacks := range [][]attack{requestAttacks, responseAttacks} {
		for _, a := range attacks {
			if len(a.send) < 10_000 && len(a.answer) < 10_000 && !a.better {
				seeds = append(seeds, [2]string{cmp.Or(a.send, plainGet+"\n"+plainGet+"\n"), a.answer})
			}
		}
	}
	// Other tests send all of them, in every manner.
	for _, i := range rand.Perm(len(seeds))[:fuzzSeeds] {
		f.Add([]byte(crlf(seeds[i][0])), []byte(crlf(seeds[i][1])), byte(atOnce))
	}
	tw := newTwins(f, in, twinOptions+"\nserve_pac /pac", warmUp)
	f.Fuzz(func(t *testing.T, send, answer []byte, manner byte) {
		// The origin's address takes the place of its name before the request is sent.
		if len(send) > 16<<10 || len(answer) > 64<<10 || bytes.Contains(send, []byte("PRI * HTTP/2.0")) || mayBeBetter.Match(bytes.ReplaceAll(send, []byte("ORIGIN"), []byte("127.0.0.1:80"))) {
			return
		}
		send, same := endsAfterChunks(send)
		if !same {
			return
		}
		text := strings.TrimSuffix(strings.TrimSuffix(string(answer), "RESET"), "CLOSE")
		if text != "" {
			text += "CLOSE" // else each run would wait for a timeout
		}
		for _, request := range tw.forwardedAlone(t, string(send), text, int(manner)%manners) {
			t.Errorf("by net/http, the origin does not get %.2000q", request)
		}
	})
}
