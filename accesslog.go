// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
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

// accessEntry is one request in the access log.
type accessEntry struct {
	r        *http.Request // as the client sent it
	clientIP string        // "": unknown
	userID   string
	duration time.Duration
	read     int64 // bytes of the request's content
	size     int64 // of the response's content
	status   int   // 0: no response
	response http.Header

	credentials bool // log_credentials
}

// newAccessEntry returns the entry for a request that is about to be served.
func newAccessEntry(r *http.Request) *accessEntry {
	e := &accessEntry{r: new(http.Request)}
	*e.r = *r
	e.r.Header = maps.Clone(r.Header)
	if !namesClient(r) {
		e.clientIP = loggedClientIP(r.RemoteAddr)
	}
	return e
}

// nameClient adds the client that a trusted proxy has named, if it has. The handler must have
// returned, because it attaches what Caddy's part of the context needs.
func (e *accessEntry) nameClient(r *http.Request) {
	if e.clientIP == "" {
		e.clientIP, _ = caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	}
}

// finish adds the client, if a trusted proxy named it, and the response to the entry.
func (e *accessEntry) finish(r *http.Request, w *downstream.Writer) *accessEntry {
	e.read, e.size, e.status, e.response = w.ContentRead(), w.Written(), w.Status(), w.Header()
	e.nameClient(r)
	if v, ok := downstream.Attached(r).(*transaction); ok {
		e.userID = v.user
		if w.Hijacked() {
			e.status = v.status // a tunnel writes its response itself
		}
	}
	return e
}

// write writes the entry for a request.
func (l *accessLog) write(e *accessEntry) {
	level := zapcore.InfoLevel
	if e.status >= 500 {
		level = zapcore.ErrorLevel
	}
	e.credentials = l.config.ShouldLogCredentials
	var fields []zapcore.Field
	for _, name := range l.names(e.r.Host) {
		c := l.loggers[name].Check(level, "handled request")
		if c == nil {
			continue
		}
		if fields == nil {
			fields = []zapcore.Field{
				zap.Object("request", e),
				zap.Int64("bytes_read", e.read),
				zap.String("user_id", e.userID),
				zap.Duration("duration", e.duration),
				zap.Int64("size", e.size),
				zap.Int("status", e.status),
				zap.Object("resp_headers", caddyhttp.LoggableHTTPHeader{Header: e.response, ShouldLogCredentials: e.credentials}),
			}
		}
		c.Write(fields...)
	}
}

// MarshalLogObject implements zapcore.ObjectMarshaler. It writes the fields of
// caddyhttp.LoggableHTTPRequest, which would take the client's address from a context that is
// expensive to prepare.
func (e *accessEntry) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	ip, port, err := net.SplitHostPort(e.r.RemoteAddr)
	if err != nil {
		ip, port = e.r.RemoteAddr, ""
	}
	enc.AddString("remote_ip", ip)
	enc.AddString("remote_port", port)
	enc.AddString("client_ip", e.clientIP)
	enc.AddString("proto", e.r.Proto)
	enc.AddString("method", e.r.Method)
	enc.AddString("host", e.r.Host)
	enc.AddString("uri", e.r.RequestURI)
	err = enc.AddObject("headers", caddyhttp.LoggableHTTPHeader{Header: e.r.Header, ShouldLogCredentials: e.credentials})
	if e.r.TransferEncoding != nil {
		_ = enc.AddArray("transfer_encoding", caddyhttp.LoggableStringArray(e.r.TransferEncoding))
	}
	if e.r.TLS != nil {
		_ = enc.AddObject("tls", caddyhttp.LoggableTLSConnState(*e.r.TLS))
	}
	return err
}

// loggedClientIP returns the address of a connection's remote end as Caddy's server logs it if
// no trusted proxy names another client.
func loggedClientIP(remote string) string {
	ip, _, err := net.SplitHostPort(remote)
	if err != nil {
		return ""
	}
	ip, _, _ = strings.Cut(ip, "%")
	return ip
}
