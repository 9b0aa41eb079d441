// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// visit is what is known of a request and its answer.
type visit struct {
	caller
	r      *http.Request
	start  time.Time
	kind   kind
	status int
	reason string // of an answer of the proxy's own: the error type of RFC 9209
	cause  cause  // if the proxy refused the request; else ""

	refusal *refusal // the answer of the proxy's own; nil: there is none

	verdict  verdict // of the limiter
	counted  bool    // is in the metrics
	limited  bool    // refused for want of a token
	reported bool    // would have been, and is counted as that
}

// newVisit begins a request, whose visit the placeholders speak of.
func (h *Handler) newVisit(r *http.Request) *visit {
	v := &visit{r: r, start: time.Now()}
	if own, ok := r.Context().(*requestContext); ok {
		own.start, own.placeholder = v.start, v.placeholder
	} else if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(v.placeholder)
	}
	v.caller = callerOf(r)
	return v
}

// refusedBy notes the answer of the proxy's own.
func (v *visit) refusedBy(f *refusal) {
	v.status, v.reason, v.cause, v.refusal = f.status, f.kind, causeOf(f), f
}

func (v *visit) placeholder(key string) (any, bool) {
	name, ok := strings.CutPrefix(key, "http.async_proxy.")
	if !ok {
		return nil, false
	}
	switch name {
	case "client":
		return clientName(v.addr), true
	case "method":
		return v.r.Method, true
	case "host":
		return v.r.Host, true
	case "status":
		return v.status, true
	case "latency":
		return time.Since(v.start), true
	case "reason":
		return v.reason, true
	case "cause":
		return string(v.cause), true
	case "message":
		if v.refusal == nil {
			return "", true
		}
		return v.refusal.text, true
	case "rule":
		return v.rule(), true
	case "user":
		return v.user, true
	}
	return nil, false
}

// rule returns the rule that denied the destination, as the log line has it, or ""
// if none did.
func (v *visit) rule() string {
	var denied *deniedError
	if v.refusal == nil || !errors.As(v.refusal.err, &denied) {
		return ""
	}
	return cmp.Or(denied.rule, "default")
}

// logRequest writes the line of a request that was answered, without its query,
// which may hold secrets. A tunnel has lines of its own. err is what went wrong,
// if anything did.
func (h *Handler) logRequest(r *http.Request, v *visit, err error, more ...zap.Field) {
	if r.Method == http.MethodConnect && v.status == http.StatusOK {
		return
	}
	var denied *deniedError
	errors.As(err, &denied)
	level := zapcore.InfoLevel
	if v.status >= 500 || denied != nil || err != nil && v.status == http.StatusForbidden || errors.Is(err, errBadCredentials) {
		level = zapcore.WarnLevel
	}
	c := h.logger.Check(level, "request")
	if c == nil {
		return
	}
	fields := []zap.Field{
		textField("method", r.Method),
		textField("host", r.Host),
		textField("path", withoutPasswords(r.URL.Path)),
		zap.Int("status", v.status),
		zap.Duration("latency", time.Since(v.start)),
		clientField(v.addr),
	}
	if v.user != "" {
		fields = append(fields, textField("user", v.user))
	}
	if v.reason != "" {
		fields = append(fields, zap.String("reason", v.reason))
	}
	if v.cause != "" {
		fields = append(fields, zap.String("cause", string(v.cause)))
	}
	if denied != nil {
		fields = append(fields, deniedFields(denied)...)
	}
	if err != nil {
		fields = append(fields, errorField(err))
	}
	c.Write(append(fields, more...)...)
}

// withoutUser returns an authority without the user name and password before it.
func withoutUser(authority string) string { return authority[strings.LastIndexByte(authority, '@')+1:] }

// withoutPasswords leaves out of a path the user names and passwords of URLs in it.
func withoutPasswords(path string) string {
	if !strings.Contains(path, "@") {
		return path
	}
	var b strings.Builder
	for {
		before, rest, found := strings.Cut(path, "//")
		b.WriteString(before)
		if !found {
			return b.String()
		}
		b.WriteString("//")
		authority, _, _ := strings.Cut(strings.TrimLeft(rest, "/"), "/")
		if at := strings.LastIndexByte(authority, '@'); at >= 0 {
			rest = strings.TrimLeft(rest, "/")[at+1:]
		}
		path = rest
	}
}

// logLimited writes the line of a refusal by the limiter, which may stand for
// more of them.
func (h *Handler) logLimited(r *http.Request, v *visit, verdict verdict, reportOnly bool) {
	c := h.logger.Check(zapcore.WarnLevel, "rate limited")
	if c == nil {
		return
	}
	fields := []zap.Field{
		zap.String("ip", clientName(v.addr)),
		textField("method", r.Method),
		textField("host", r.Host),
		textField("path", withoutPasswords(r.URL.Path)),
		zap.String("cause", string(causeRateLimited)),
		zap.Duration("retry_after", verdict.wait),
		zap.Int64("refused", verdict.refused),
	}
	if v.user != "" {
		fields = append(fields, textField("user", v.user))
	}
	if reportOnly { // the request has no answer yet
		fields = append(fields, zap.Bool("report_only", true))
	} else {
		fields = append(fields,
			zap.Int("status", v.status),
			zap.Duration("latency", time.Since(v.start)),
			zap.String("reason", v.reason))
	}
	c.Write(fields...)
}

// logReported writes the line of a destination that would have been denied.
func (h *Handler) logReported(ctx context.Context, target string, denied *deniedError) {
	metrics.reported.WithLabelValues("rules").Inc()
	if c := h.logger.Check(zapcore.WarnLevel, "would be denied"); c != nil {
		client, _ := caddyhttp.GetVar(ctx, caddyhttp.ClientIPVarKey).(string)
		c.Write(append(deniedFields(denied),
			textField("target", target),
			textField("client", client),
			zap.Bool("report_only", true))...)
	}
}

// deniedFields say by what a destination was denied, which address it had, if that
// was known, and how it could be allowed.
func deniedFields(denied *deniedError) []zap.Field {
	rule := denied.rule
	if rule == "" {
		rule = "default"
	}
	fields := []zap.Field{zap.String("rule", rule)}
	if denied.to.IsValid() {
		fields = append(fields, zap.Stringer("address", denied.to))
	}
	if denied.hint != "" {
		fields = append(fields, zap.String("hint", denied.hint))
	}
	return fields
}

func (t *tunnel) logOpened() {
	if c := t.logger.Check(zapcore.InfoLevel, "CONNECT tunnel"); c != nil {
		c.Write(
			zap.Uint64("id", t.id),
			textField("target", t.target),
			zap.Stringer("address", t.address),
			clientField(t.client),
			t.userField(),
			textField("proto", t.proto),
		)
	}
}

func (t *tunnel) logClosed() {
	if c := t.logger.Check(zapcore.InfoLevel, "CONNECT tunnel closed"); c != nil {
		c.Write(
			zap.Uint64("id", t.id),
			textField("target", t.target),
			clientField(t.client),
			t.userField(),
			textField("proto", t.proto),
			zap.Int64("bytes_up", t.up.Load()),
			zap.Int64("bytes_down", t.down.Load()),
			zap.Duration("duration", time.Since(t.start)),
			zap.Stringp("reason", t.reason.Load()),
		)
	}
}

func (t *tunnel) userField() zap.Field {
	if t.user == "" {
		return zap.Skip()
	}
	return textField("user", t.user)
}

// clientField names the client. One that has no address came by a Unix socket.
func clientField(addr netip.Addr) zap.Field {
	return zap.String("client", clientName(addr))
}

func clientName(addr netip.Addr) string {
	if !addr.IsValid() {
		return "unix"
	}
	return addr.String()
}
