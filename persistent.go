// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"golang.org/x/net/http/httpguts"
)

// persistentConn is a client's connection that was taken over from net/http with
// its second request: from then on requests are read and answered here, at about
// 0.7 of the cost. It is for plain requests without content; with the first one
// that is anything else, or odd, the connection goes back to net/http as if
// nothing of that request had been read.
type persistentConn struct {
	*net.TCPConn
	r       *bufio.Reader
	w       responseWriter
	out     http.ResponseWriter // w, below Caddy's timeout for stalled writes
	handler *Handler
	site    *caddyhttp.Server
	server  *http.Server
	remote  string
	blank   *http.Request // has the context of the connection's requests
	gone    context.CancelFunc
	due     time.Time // the deadline that is set for reading
	state   atomic.Int32

	mu        sync.Mutex
	answering bool          // a request
	watch     chan struct{} // closed when the watch for the client's leaving ends; nil: there is none
}

// What a persistentConn is doing.
const (
	connBusy   = iota // it answers a request
	connIdle          // it waits for one, or for the rest of its head
	connClosed        // while it was idle
)

// persistentConns are those of a handler.
type persistentConns struct {
	may atomic.Bool // whether connections are taken over at all

	mu    sync.Mutex
	conns map[*persistentConn]struct{}
	over  atomic.Bool // the server is shutting down
}

// persistentCount is how many connections are taken over, by the handlers of
// earlier configs too, whose last answers a process that exits waits for.
var persistentCount atomic.Int64

func newPersistentConns() *persistentConns {
	return &persistentConns{conns: make(map[*persistentConn]struct{})}
}

// ownsConnections reports whether nobody but h has a part in the plain requests
// to a server: no handler or matcher before it, no error routes, access log or
// metrics, nor limits to a request as a whole.
func (h *Handler) ownsConnections(app *caddyhttp.App, server *caddyhttp.Server) bool {
	return isFirst(server.Routes, h) && server.Errors == nil && server.Logs == nil && app.Metrics == nil &&
		server.ReadTimeout <= 0 && server.WriteTimeout <= 0 && server.ReadMinRate == 0 && server.WriteMinRate == 0 &&
		len(server.ExpectedUnderscoreHeaders) == 0 && len(server.ExpectedDotHeaders) == 0
}

// isFirst reports whether h gets all requests, and before any other handler.
func isFirst(routes caddyhttp.RouteList, h caddyhttp.MiddlewareHandler) bool {
	if len(routes) == 0 || len(routes[0].MatcherSets) > 0 || len(routes[0].Handlers) == 0 {
		return false
	}
	if sub, ok := routes[0].Handlers[0].(*caddyhttp.Subroute); ok {
		return sub.Errors == nil && isFirst(sub.Routes, h)
	}
	return routes[0].Handlers[0] == h
}

// takeOver takes the connection of r over, if that can be and pays: with the
// second request that may be served here, which it then serves.
func (h *Handler) takeOver(w http.ResponseWriter, r *http.Request) bool {
	if r.ProtoMajor != 1 || !h.persistent.may.Load() || !isOrdinary(r) || r.URL.Scheme != "http" {
		return false
	}
	conn, _ := r.Context().Value(connKey{}).(*connection)
	if conn == nil {
		return false
	}
	conn.served++
	socket, ok := conn.Conn.(*net.TCPConn)
	if !ok || conn.served == 1 {
		return false
	}
	c := &persistentConn{TCPConn: socket, handler: h, remote: r.RemoteAddr}
	c.site, _ = r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	c.server, _ = r.Context().Value(http.ServerContextKey).(*http.Server)
	if c.site == nil || c.server == nil || !h.persistent.add(c) {
		return false
	}
	_, early, err := hijack(w)
	if err != nil {
		h.persistent.remove(c)
		return false
	}
	c.prepare(conn.ctx, early)
	first := c.newRequest()
	first.Method, first.URL, first.RequestURI, first.Host, first.Header = r.Method, r.URL, r.RequestURI, r.Host, r.Header
	// The goroutine of net/http's, and all that it holds, ends here.
	go c.serve(first)
	return true
}

// isOrdinary reports whether r is a request of HTTP/1.1 that has no content and
// asks for nothing but a response. POST is none even without content, as net/http
// bears with blank lines behind it.
func isOrdinary(r *http.Request) bool {
	if r.ProtoMinor == 0 || r.ContentLength != 0 || r.Method == http.MethodConnect || r.Method == http.MethodPost {
		return false
	}
	for _, value := range r.Header["Connection"] {
		for token := range strings.FieldsFuncSeq(value, func(c rune) bool { return c == ',' || c == ' ' || c == '\t' }) {
			if strings.EqualFold(token, "close") { // so far as net/http sees it
				return false
			}
		}
	}
	for _, name := range [...]string{"Content-Length", "Expect", "Trailer", "Transfer-Encoding", "Upgrade"} {
		if _, ok := r.Header[name]; ok {
			return false
		}
	}
	return true
}

func (c *persistentConn) prepare(ctx context.Context, early []byte) {
	var r io.Reader = c.TCPConn
	if len(early) > 0 {
		r = io.MultiReader(bytes.NewReader(early), r)
	}
	c.r = bufio.NewReaderSize(r, max(4<<10, len(early)))
	ctx = context.WithValue(ctx, http.LocalAddrContextKey, c.LocalAddr())
	ctx, c.gone = context.WithCancel(ctx)
	c.w.conn, c.w.over, c.out = c.TCPConn, &c.handler.persistent.over, &c.w
	if timeout := time.Duration(c.site.WriteIdleTimeout); timeout > 0 {
		idle := &caddyhttp.IdleTimeoutWriter{
			ResponseWriterWrapper: &caddyhttp.ResponseWriterWrapper{ResponseWriter: &c.w},
			Ctrl:                  http.NewResponseController(&c.w),
			Deadline:              caddyhttp.IdleDeadline{Timeout: timeout},
			MaxChunk:              c.site.MaxWriteChunk,
			Logger:                c.handler.logger,
		}
		ctx, c.out = caddyhttp.ContextWithIdleTimeouts(ctx, nil, idle), idle
	}
	c.blank = new(http.Request).WithContext(watchedContext{ctx, c})
}

func (c *persistentConn) newRequest() *http.Request {
	r := new(http.Request)
	*r = *c.blank
	r.Proto, r.ProtoMajor, r.ProtoMinor, r.RemoteAddr, r.Body = "HTTP/1.1", 1, 1, c.remote, http.NoBody
	return r
}

// serve answers r and the requests after it, until the connection ends or goes
// back to net/http.
func (c *persistentConn) serve(r *http.Request) {
	back := false
	defer func() {
		if err := recover(); err != nil && err != http.ErrAbortHandler {
			c.handler.logger.Error("panic serving a client", zap.String("client", c.remote), zap.Any("panic", err), zap.ByteString("stack", debug.Stack()))
		}
		c.stopWatch() // reads from c.r
		c.gone()
		if !back {
			_ = c.Close()
		}
		c.handler.persistent.remove(c)
	}()
	for c.answer(r) {
		if r, back = c.next(); back {
			c.giveBack()
		}
		if r == nil {
			return
		}
	}
}

// answer answers a request and reports whether the connection can serve more.
func (c *persistentConn) answer(r *http.Request) bool {
	c.mu.Lock()
	c.answering = true
	c.mu.Unlock()
	c.w.begin(r.Method == http.MethodHead)
	// As Caddy prepares it, for whoever asks for the client, a variable or a
	// placeholder.
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), c.out, c.site)
	c.w.header["Server"] = []string{"Caddy"}
	if err := c.handler.handle(c.out, r, nil); err != nil {
		status := http.StatusInternalServerError
		var failed caddyhttp.HandlerError
		if errors.As(err, &failed) && failed.StatusCode > 0 {
			status = failed.StatusCode
		}
		c.w.WriteHeader(status)
	}
	c.stopWatch()
	if err := c.w.end(); err != nil || c.w.closes || c.blank.Context().Err() != nil {
		return false
	}
	_ = c.SetWriteDeadline(time.Time{})
	return true
}

// next returns the next request; none, if the connection has ended; or that the
// connection has to go back to net/http, as there is one that is not ordinary.
func (c *persistentConn) next() (r *http.Request, back bool) {
	c.state.Store(connIdle)
	if c.handler.persistent.over.Load() {
		return nil, false
	}
	if c.r.Buffered() < 4 {
		c.expect(c.server.IdleTimeout)
		if _, err := c.r.Peek(4); err != nil { // to less net/http does not answer
			return nil, false
		}
	}
	// Until there is a whole head, a server that shuts down waits for nobody.
	if !c.readHead() || !c.state.CompareAndSwap(connIdle, connBusy) {
		return nil, false
	}
	input, _ := c.r.Peek(c.r.Buffered())
	if end := bytes.Index(input, headEnd); end >= 0 {
		if r = c.parse(string(input[:end])); r != nil {
			_, _ = c.r.Discard(end + len(headEnd)) // is buffered
		}
	}
	return r, r == nil
}

// expect limits how long reading may take from now. A limit that is about right
// is left, as each costs a change of a timer.
func (c *persistentConn) expect(limit time.Duration) {
	if limit <= 0 {
		if !c.due.IsZero() {
			c.due = time.Time{}
			_ = c.SetReadDeadline(c.due)
		}
		return
	}
	due := time.Now().Add(limit)
	if late := c.due.Sub(due); late < -limit/16 || late > 0 {
		c.due = due
		_ = c.SetReadDeadline(due)
	}
}

// readHead reads until there is a whole head, or no room for more, or a line that
// parse would not take: then net/http may see to it, and say what is wrong without
// waiting for the rest. It reports whether one of these has come.
func (c *persistentConn) readHead() bool {
	waits, checked := false, -1
	for {
		input, _ := c.r.Peek(c.r.Buffered())
		if bytes.Contains(input, headEnd) || len(input) == c.r.Size() {
			return true
		}
		if i := bytes.LastIndexByte(input, '\n'); i > checked {
			checked = i
			if _, _, header := parseLines(string(bytes.TrimSuffix(input[:i], []byte("\r")))); header == nil {
				return true
			}
		}
		if !waits {
			waits = true
			c.due = time.Unix(1, 0) // whatever is set, it is not for this
			c.expect(c.server.ReadHeaderTimeout)
		}
		if _, err := c.r.Peek(len(input) + 1); err != nil {
			return err == io.EOF // who says nothing more may still want an answer
		}
	}
}

// parse returns the request with the given head, without its empty line, if it
// is ordinary and well-formed beyond doubt.
func (c *persistentConn) parse(head string) *http.Request {
	method, target, header := parseLines(head)
	if header == nil {
		return nil
	}
	u, err := url.ParseRequestURI(target)
	if err != nil || strings.Trim(u.Hostname(), ".") == "" || !httpguts.ValidHostHeader(u.Host) {
		return nil
	}
	if strings.HasPrefix(u.Path, "/.well-known/") { // Caddy may be asked to prove there whose a name is
		return nil
	}
	if len(header["Pragma"]) > 0 && len(header["Cache-Control"]) == 0 { // net/http adds that
		return nil
	}
	if host := header["Host"]; len(host) != 1 || !httpguts.ValidHostHeader(host[0]) {
		return nil
	}
	delete(header, "Host")
	r := c.newRequest()
	r.Method, r.URL, r.RequestURI, r.Host, r.Header = method, u, target, u.Host, header
	if !isOrdinary(r) {
		return nil
	}
	return r
}

// parseLines reads a head, or the first lines of one, without the last line end.
// It returns no fields if there is a line that is not that of an ordinary request.
func parseLines(head string) (method, target string, header http.Header) {
	line, lines, more := strings.Cut(head, "\r\n")
	method, rest, _ := strings.Cut(line, " ")
	target, version, _ := strings.Cut(rest, " ")
	switch {
	case version != "HTTP/1.1" || !strings.HasPrefix(target, "http://") || len(method) > 32 || !httpguts.ValidHeaderFieldName(method):
		return "", "", nil
	case !more:
		return method, target, make(http.Header)
	}
	return method, target, parseStrictly(lines)
}

// parseStrictly reads field lines. It returns nil if there is one that is not
// well-formed, or whose name Caddy would not let pass.
func parseStrictly(lines string) http.Header {
	n := strings.Count(lines, "\r\n") + 1
	header := make(http.Header, n)
	values := make([]string, 0, n) // one array for all
	for line := range strings.SplitSeq(lines, "\r\n") {
		name, value, found := strings.Cut(line, ":")
		value = strings.Trim(value, " \t")
		if !found || !httpguts.ValidHeaderFieldName(name) || strings.ContainsAny(name, "_.") || !httpguts.ValidHeaderFieldValue(value) {
			return nil
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		if prior, ok := header[name]; ok {
			header[name] = append(prior, value)
			continue
		}
		values = append(values, value)
		header[name] = values[len(values)-1 : len(values) : len(values)]
	}
	return header
}

// giveBack lets net/http serve the connection, with what was read and not taken.
func (c *persistentConn) giveBack() {
	unread, _ := c.r.Peek(c.r.Buffered())
	if bytes.HasPrefix(unread, []byte("PRI * HTTP/2.0")) { // net/http would speak that, as if to a new client
		_ = c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	ln := new(returnedListener)
	ln.conn.Store(&returnedConn{TCPConn: c.TCPConn, early: unread})
	_ = c.server.Serve(ln) // returns when the connection was accepted, or the server is closed
}

// watchedContext is the context of requests. It is done when the client leaves,
// which takes a look out for that: only when somebody waits for it.
type watchedContext struct {
	context.Context
	conn *persistentConn
}

func (c watchedContext) Done() <-chan struct{} {
	c.conn.startWatch()
	return c.Context.Done()
}

func (c *persistentConn) startWatch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.answering || c.watch != nil {
		return
	}
	c.watch = make(chan struct{})
	c.due = time.Time{}
	_ = c.SetReadDeadline(c.due)
	go c.look(c.watch)
}

// look reads ahead until the connection has ended, or stopWatch is called, or
// there is no room for more. A client that has sent further requests and then
// says that it is done waits for their answers.
func (c *persistentConn) look(done chan<- struct{}) {
	defer close(done)
	for {
		_, err := c.r.Peek(c.r.Buffered() + 1)
		if err == nil {
			continue
		}
		c.mu.Lock()
		if c.answering && err != bufio.ErrBufferFull && (err != io.EOF || c.r.Buffered() == 0) {
			c.gone()
		}
		c.mu.Unlock()
		return
	}
}

func (c *persistentConn) stopWatch() {
	c.mu.Lock()
	c.answering = false
	watch := c.watch
	if watch != nil {
		c.due = time.Unix(1, 0)
		_ = c.SetReadDeadline(c.due)
	}
	c.mu.Unlock()
	if watch != nil {
		<-watch
		c.watch = nil
	}
}

// add notes a connection, unless the server is shutting down.
func (p *persistentConns) add(c *persistentConn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over.Load() {
		return false
	}
	p.conns[c] = struct{}{}
	persistentCount.Add(1)
	return true
}

func (p *persistentConns) remove(c *persistentConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	persistentCount.Add(-1)
}

// shutdown closes idle connections. The others end with the answer that they are
// at.
func (p *persistentConns) shutdown() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over.Store(true)
	for c := range p.conns {
		if c.state.CompareAndSwap(connIdle, connClosed) {
			_ = c.Close()
		}
	}
}

// waitForAnswers waits until the last answers are over, after all shutdowns.
func waitForAnswers(ctx context.Context) {
	waitUntil(ctx, func() bool { return persistentCount.Load() == 0 })
}

// connection is what is known of a connection beyond its requests.
type connection struct {
	net.Conn
	ctx    context.Context // of the connection
	served int             // ordinary requests by HTTP/1; the connection's own
}

// returnedConn is a connection that net/http has got back, and keeps.
type returnedConn struct {
	*net.TCPConn
	early []byte // what was read from it before
}

func (c *returnedConn) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	c.early = nil
	return c.TCPConn.Read(p)
}

// returnedListener accepts one connection.
type returnedListener struct{ conn atomic.Pointer[returnedConn] }

func (l *returnedListener) Accept() (net.Conn, error) {
	if conn := l.conn.Swap(nil); conn != nil {
		return conn, nil
	}
	return nil, io.EOF
}

// Close closes a connection that was not accepted.
func (l *returnedListener) Close() error {
	if conn := l.conn.Swap(nil); conn != nil {
		return conn.Close()
	}
	return nil
}

func (l *returnedListener) Addr() net.Addr { return &net.TCPAddr{} }
