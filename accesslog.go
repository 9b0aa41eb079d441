// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/tls"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// accessLog writes the entries of Caddy's access log for requests that do not pass through
// Caddy's HTTP server. Each entry is what that server would write.
type accessLog struct {
	config  *caddyhttp.ServerLogConfig
	logger  *zap.Logger            // http.log.access
	loggers map[string]*zap.Logger // the loggers below it, by the names in the config
	usual   []string               // the names for hosts that the config does not list
}

// newAccessLog returns the access log of a server; nil if it has none. It must be called once
// the http app is provisioned.
func newAccessLog(ctx caddy.Context, app *caddyhttp.App, server *caddyhttp.Server) *accessLog {
	if server.Logs == nil {
		return nil
	}
	l := &accessLog{
		config:  server.Logs,
		logger:  ctx.Logger(app).Named("log.access"),
		loggers: make(map[string]*zap.Logger),
		usual:   []string{server.Logs.DefaultLoggerName},
	}
	l.loggers[""] = l.logger
	add := func(names ...string) {
		for _, name := range names {
			if l.loggers[name] == nil {
				l.loggers[name] = l.logger.Named(name)
			}
		}
	}
	add(server.Logs.DefaultLoggerName)
	for _, names := range server.Logs.LoggerNames {
		add(names...)
	}
	return l
}

// includes reports whether requests for a host are logged.
func (l *accessLog) includes(host string) bool {
	c := l.config
	if len(c.LoggerNames) == 0 && len(c.SkipHosts) == 0 {
		return !c.SkipUnmappedHosts
	}
	host = withoutPort(host)
	for pattern := range c.LoggerNames {
		if certmagic.MatchWildcard(host, pattern) {
			return true
		}
	}
	if slices.ContainsFunc(c.SkipHosts, func(pattern string) bool { return certmagic.MatchWildcard(host, pattern) }) {
		return false
	}
	return !c.SkipUnmappedHosts
}

// names returns the names of the loggers for a host.
func (l *accessLog) names(host string) []string {
	if len(l.config.LoggerNames) > 0 {
		host = strings.ToLower(withoutPort(host))
		if names, ok := l.config.LoggerNames[host]; ok {
			return names
		}
		labels := strings.Split(host, ".")
		for i := range labels {
			if labels[i] == "" {
				continue
			}
			labels[i] = "*"
			if names, ok := l.config.LoggerNames[strings.Join(labels, ".")]; ok {
				return names
			}
		}
	}
	return l.usual
}

// withoutPort returns a host without its port, as Caddy's server determines it.
func withoutPort(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return host
}

// accessEntry is one request in the access log. free returns it to its pool.
type accessEntry struct {
	// The request as the client sent it. The handler changes its own.
	ip, port, clientIP, proto, method, host, uri string // clientIP "": unknown
	fields                                       loggedFields
	transferEncoding                             []string
	tls                                          *tls.ConnectionState

	userID   string
	duration time.Duration
	read     int64 // bytes of the request's content
	size     int64 // of the response's content
	status   int   // 0: no response
	response http.Header

	line        [7]zapcore.Field
	array       loggedArray // that is being written
	credentials bool        // log_credentials
}

// entryPool is a pool of entries: each request needs one.
var entryPool = sync.Pool{New: func() any { return new(accessEntry) }}

// newAccessEntry returns the entry for a request that is about to be served.
func newAccessEntry(r *http.Request) *accessEntry {
	e := entryPool.Get().(*accessEntry)
	e.proto, e.method, e.host, e.uri = r.Proto, r.Method, r.Host, r.RequestURI
	e.transferEncoding, e.tls = r.TransferEncoding, r.TLS
	e.fields.copy(r.Header)
	var err error
	if e.ip, e.port, err = net.SplitHostPort(r.RemoteAddr); err != nil {
		e.ip, e.port = r.RemoteAddr, ""
	} else if !namesClient(r) {
		e.clientIP, _, _ = strings.Cut(e.ip, "%")
	}
	return e
}

// free returns the entry to its pool. Nothing may use it any longer.
func (e *accessEntry) free() {
	*e = accessEntry{fields: e.fields}
	if e.fields.clear() {
		entryPool.Put(e)
	}
}

// nameClient adds the client that a trusted proxy has named, if there is one. The handler must have
// returned, because Caddy's part of the context needs what the handler attaches to the request.
func (e *accessEntry) nameClient(r *http.Request) {
	if e.clientIP == "" {
		e.clientIP, _ = caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	}
}

// finish adds the client, if a trusted proxy named it, and the response to the entry.
func (e *accessEntry) finish(r *http.Request, w *downstream.Writer) {
	e.read, e.size, e.status, e.response = w.ContentRead(), w.Written(), w.Status(), w.Header()
	e.nameClient(r)
	if v, ok := downstream.Attached(r).(*transaction); ok {
		e.userID = v.user
		if w.Hijacked() {
			e.status = v.status // a tunnel writes its response itself
		}
	}
}

// write writes the entry for a request.
func (l *accessLog) write(e *accessEntry) {
	level := zapcore.InfoLevel
	if e.status >= 500 {
		level = zapcore.ErrorLevel
	}
	e.credentials = l.config.ShouldLogCredentials
	for _, name := range l.names(e.host) {
		if c := l.loggers[name].Check(level, "handled request"); c != nil {
			c.Write(e.zapFields()...)
		}
	}
}

// zapFields returns the fields of the entry's line.
func (e *accessEntry) zapFields() []zapcore.Field {
	if e.line[0].Key == "" {
		e.line = [...]zapcore.Field{
			zap.Object("request", e),
			zap.Int64("bytes_read", e.read),
			zap.String("user_id", e.userID),
			zap.Duration("duration", e.duration),
			zap.Int64("size", e.size),
			zap.Int("status", e.status),
			zap.Object("resp_headers", (*loggedResponse)(e)),
		}
	}
	return e.line[:]
}

// MarshalLogObject implements zapcore.ObjectMarshaler. It writes the fields of
// caddyhttp.LoggableHTTPRequest, which would take the client's address from a context that is
// expensive to prepare.
func (e *accessEntry) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("remote_ip", e.ip)
	enc.AddString("remote_port", e.port)
	enc.AddString("client_ip", e.clientIP)
	enc.AddString("proto", e.proto)
	enc.AddString("method", e.method)
	enc.AddString("host", e.host)
	enc.AddString("uri", e.uri)
	err := enc.AddObject("headers", (*loggedRequest)(e))
	if e.transferEncoding != nil {
		_ = enc.AddArray("transfer_encoding", caddyhttp.LoggableStringArray(e.transferEncoding))
	}
	if e.tls != nil {
		_ = enc.AddObject("tls", caddyhttp.LoggableTLSConnState(*e.tls))
	}
	return err
}

// loggedRequest and loggedResponse write the fields of an entry's request and response as
// caddyhttp.LoggableHTTPHeader does, which allocates for each field.
type loggedRequest accessEntry
type loggedResponse accessEntry

// MarshalLogObject implements zapcore.ObjectMarshaler.
func (e *loggedRequest) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	for _, f := range e.fields.fields {
		(*accessEntry)(e).addField(enc, f.name, f.values)
	}
	return nil
}

// MarshalLogObject implements zapcore.ObjectMarshaler.
func (e *loggedResponse) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	for name, values := range e.response {
		(*accessEntry)(e).addField(enc, h1.WireName(name), values)
	}
	return nil
}

// addField adds a field of a message to a log line. It redacts credentials, unless the option
// log_credentials is set.
func (e *accessEntry) addField(enc zapcore.ObjectEncoder, name string, values []string) {
	if !e.credentials && isCredential(name) {
		values = []string{"REDACTED"}
	}
	if reflect.TypeOf(enc) == jsonEncoder {
		e.array = values
		_ = enc.AddArray(name, &e.array)
		return
	}
	_ = enc.AddArray(name, caddyhttp.LoggableStringArray(values)) // the filters of logs know its type
}

// jsonEncoder is the type of the encoder of most logs.
var jsonEncoder = reflect.TypeOf(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}))

// loggedArray is a caddyhttp.LoggableStringArray that is not allocated for each field.
type loggedArray []string

// MarshalLogArray implements zapcore.ArrayMarshaler.
func (a *loggedArray) MarshalLogArray(enc zapcore.ArrayEncoder) error {
	for _, value := range *a {
		enc.AppendString(value)
	}
	return nil
}

// isCredential reports whether the values of a field are credentials.
func isCredential(name string) bool {
	for _, each := range [...]string{"Cookie", "Set-Cookie", "Authorization", "Proxy-Authorization"} {
		if len(name) == len(each) && strings.EqualFold(name, each) {
			return true
		}
	}
	return false
}

// loggedFields is a copy of the fields of a message.
type loggedFields struct {
	fields []loggedField
	values []string // of all fields
}

type loggedField struct {
	name   string
	values []string
}

func (f *loggedFields) copy(h http.Header) {
	for name, values := range h {
		first := len(f.values)
		f.values = append(f.values, values...)
		f.fields = append(f.fields, loggedField{name, f.values[first:]})
	}
}

// clear drops the fields. It reports whether the memory that it keeps is small enough for a pool.
func (f *loggedFields) clear() bool {
	clear(f.fields)
	clear(f.values)
	f.fields, f.values = f.fields[:0], f.values[:0]
	return cap(f.fields) <= 64 && cap(f.values) <= 64
}
