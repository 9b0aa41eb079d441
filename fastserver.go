// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
)

// fastServer does for requests on the fast path what Caddy's HTTP server does around its
// routes: it writes the access log, observes its metrics, and lets the error routes respond to
// errors.
type fastServer struct {
	proxy    *proxy
	access   *accessLog     // nil: none
	metrics  *serverMetrics // nil: none
	errorLog *zap.Logger    // http.log.error
	errors   *caddyhttp.HTTPErrorConfig
	onError  caddyhttp.Handler // the error routes; nil: none
}

func newFastServer(ctx caddy.Context, app *caddyhttp.App, server *caddyhttp.Server, p *proxy) *fastServer {
	s := &fastServer{
		proxy: p, access: newAccessLog(ctx, app, server),
		errorLog: ctx.Logger(app).Named("log.error"), errors: server.Errors,
	}
	if app.Metrics != nil {
		s.metrics = newServerMetrics(ctx, app, server)
	}
	if server.Errors != nil && len(server.Errors.Routes) > 0 {
		s.onError = server.Errors.Routes.Compile(caddyhttp.HandlerFunc(writeErrorStatus))
	}
	return s
}

// writeErrorStatus responds to an error for which no error route has responded.
func writeErrorStatus(w http.ResponseWriter, r *http.Request) error {
	err, _ := r.Context().Value(caddyhttp.ErrorCtxKey).(error)
	w.WriteHeader(cmp.Or(caddyStatus(err), http.StatusInternalServerError))
	return nil
}

// serve serves a request.
func (s *fastServer) serve(out http.ResponseWriter, r *http.Request) {
	w := downstream.WriterOf(out)
	w.Header()["Server"] = []string{"Caddy"}
	start := time.Now()
	logged := s.access != nil && s.access.includes(r.Host)
	var entry *accessEntry
	if logged || s.onError != nil {
		entry = newAccessEntry(r) // before the handler changes the request
		defer func() {
			if logged {
				entry.finish(r, w)
				s.access.write(entry)
			}
			entry.free()
		}()
	}
	var seen *observation
	if s.metrics != nil {
		if seen = s.metrics.begin(r, start); seen != nil {
			defer seen.end()
			w.OnHeader(seen.onHeader)
		}
	}
	err := s.proxy.serveHTTP(out, r, noNext)
	duration := time.Since(start)
	if seen != nil {
		if w.Hijacked() && err == nil {
			seen.wroteHeader(http.StatusOK)
		}
		seen.served(r, w.Written(), duration, err)
		w.OnHeader(nil)
	}
	if entry != nil {
		entry.duration = duration
	}
	if err != nil && !w.Hijacked() {
		s.fail(out, r, entry, err, duration)
	}
}

// fail responds to a request for which the handler returned an error, and logs the error.
func (s *fastServer) fail(out http.ResponseWriter, r *http.Request, entry *accessEntry, err error, duration time.Duration) {
	if entry == nil {
		entry = newAccessEntry(r)
	}
	entry.nameClient(r)
	status, message := http.StatusInternalServerError, err.Error()
	fields := []zap.Field{zap.Object("request", entry), zap.Duration("duration", duration)}
	var failed caddyhttp.HandlerError
	if errors.As(err, &failed) {
		status = failed.StatusCode
		if failed.Err != nil {
			message = failed.Err.Error()
		}
		fields = append(fields, zap.Int("status", status), zap.String("err_id", failed.ID), zap.String("err_trace", failed.Trace))
	} else {
		fields = append(fields, zap.Error(err))
	}
	level := zapcore.DebugLevel
	if s.onError == nil {
		if status >= 500 {
			level = zapcore.ErrorLevel
		}
		out.WriteHeader(status)
	} else if err := s.onError.ServeHTTP(out, s.errors.WithError(r, err)); err != nil {
		level, fields = zapcore.ErrorLevel, slices.Insert(fields, 2, zap.String("error", err.Error()), zap.Namespace("first_error"), zap.String("msg", message))
		message = "error handling handler error"
		out.WriteHeader(status)
	}
	names := []string{""}
	if s.access != nil {
		names = s.access.names(r.Host)
	}
	for _, name := range names {
		s.errorLog.Named(name).Log(level, message, fields...)
	}
}
