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
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// logRequest logs a completed request. It omits the query, which may contain secrets.
// Tunnels have their own log lines. err is what failed, or nil.
func (p *proxy) logRequest(r *http.Request, v *transaction, err error, more ...zap.Field) {
	if r.Method == http.MethodConnect && v.status == http.StatusOK {
		return
	}
	denied := deniedBy(err)
	level := zapcore.InfoLevel
	if v.status >= 500 || denied != nil || err != nil && v.status == http.StatusForbidden || errors.Is(err, errBadCredentials) {
		level = zapcore.WarnLevel
	}
	c := p.logger.Check(level, "request")
	if c == nil {
		return
	}
	pooled := linePool.Get().(*[]zap.Field)
	fields := append(appendOutcome(appendRequest((*pooled)[:0], r), v), zap.String("client", v.name))
	if v.user != "" {
		fields = append(fields, textField("user", v.user))
	}
	fields = append(fields, policyField(v.policy.name))
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
	writeLine(c, pooled, append(fields, more...))
}

// appendRequest appends the fields that say which request a line is about. All lines about requests
// begin with them.
func appendRequest(fields []zap.Field, r *http.Request) []zap.Field {
	return append(fields,
		textField("method", r.Method),
		textField("host", r.Host),
		textField("path", withoutPasswords(r.URL.Path)))
}

// appendOutcome appends the fields that say how a request ended. They follow those of
// appendRequest.
func appendOutcome(fields []zap.Field, v *transaction) []zap.Field {
	return append(fields,
		zap.Int("status", v.status),
		zap.Duration("latency", time.Since(v.start)))
}

// linePool is a pool of slices for the fields of a log line. Nothing keeps them once it is written.
var linePool = sync.Pool{New: func() any { return new([]zap.Field) }}

// writeLine writes a line whose fields are in a slice of linePool, and returns the slice to the pool.
func writeLine(c *zapcore.CheckedEntry, pooled *[]zap.Field, fields []zap.Field) {
	c.Write(fields...)
	clear(fields)
	*pooled = fields
	linePool.Put(pooled)
}

// deniedBy returns the denial by the rules in err, or nil if there is none.
func deniedBy(err error) *access.DeniedError {
	if err == nil {
		return nil
	}
	var denied *access.DeniedError
	errors.As(err, &denied)
	return denied
}

// withoutPasswords removes the user names and passwords of URLs in a path.
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

// logLimited logs a denial by the limiter. One line may stand for several denials. With reportOnly
// the request goes on, and the line "request" says how it ends.
func (p *proxy) logLimited(r *http.Request, v *transaction, verdict bucket.Decision, reportOnly bool) {
	c := p.logger.Check(zapcore.WarnLevel, "rate limited")
	if c == nil {
		return
	}
	pooled := linePool.Get().(*[]zap.Field)
	fields := appendRequest((*pooled)[:0], r)
	if !reportOnly {
		fields = appendOutcome(fields, v)
	}
	fields = append(fields, zap.String("ip", v.name))
	if v.user != "" {
		fields = append(fields, textField("user", v.user))
	}
	fields = append(fields, policyField(v.policy.name))
	if !reportOnly {
		fields = append(fields, zap.String("reason", v.reason))
	}
	fields = append(fields,
		zap.String("cause", string(causeRateLimited)),
		zap.Duration("retry_after", verdict.Wait),
		zap.Int64("refused", verdict.LogCount))
	if reportOnly {
		fields = append(fields, zap.Bool("report_only", true))
	}
	writeLine(c, pooled, fields)
}

// logReported logs a destination that report_only kept from being denied.
func (y *policy) logReported(ctx context.Context, target string, denied *access.DeniedError) {
	program.metrics.Reported(reportedRules)
	if c := y.proxy.logger.Check(zapcore.WarnLevel, "would be denied"); c != nil {
		client, _ := caddyhttp.GetVar(ctx, caddyhttp.ClientIPVarKey).(string)
		c.Write(append(deniedFields(denied),
			textField("target", target),
			textField("client", client),
			policyField(y.name),
			zap.Bool("report_only", true))...)
	}
}

// deniedFields returns the log fields of a denied destination: the rule, the address if
// it is known, and a hint on how to allow it.
func deniedFields(denied *access.DeniedError) []zap.Field {
	fields := []zap.Field{zap.String("rule", ruleOf(denied))}
	if denied.To.IsValid() {
		fields = append(fields, zap.Stringer("address", denied.To))
	}
	if denied.Hint != "" {
		fields = append(fields, textField("hint", denied.Hint))
	}
	return fields
}

// ruleOf returns the rule that denies a destination, as operators see it.
func ruleOf(denied *access.DeniedError) string { return cmp.Or(denied.Rule, "default") }

// Opened implements the tunnel's Observer.
func (s *site) Opened(t *tunnel.Tunnel) {
	s.process.reconcile(t)
	program.status.Active()
	if c := s.logger.Check(zapcore.InfoLevel, "CONNECT tunnel"); c != nil {
		pooled := linePool.Get().(*[]zap.Field)
		writeLine(c, pooled, append((*pooled)[:0],
			zap.Uint64("id", t.ID),
			textField("target", t.Target),
			zap.Stringer("address", t.Address),
			clientField(t.Client),
			userField(t),
			policyField(t.Owner.Policy),
			textField("proto", t.Proto),
		))
	}
}

// Closed implements the tunnel's Observer.
func (s *site) Closed(t *tunnel.Tunnel) {
	duration := time.Since(t.Start)
	program.metrics.TunnelClosed(duration)
	countTunnelBytes(t)
	tableOf(t).AddBytes(t.LimitKey, t.BytesUp(), t.BytesDown())
	if c := s.logger.Check(zapcore.InfoLevel, "CONNECT tunnel closed"); c != nil {
		pooled := linePool.Get().(*[]zap.Field)
		writeLine(c, pooled, append((*pooled)[:0],
			zap.Uint64("id", t.ID),
			textField("target", t.Target),
			clientField(t.Client),
			userField(t),
			policyField(t.Owner.Policy),
			textField("proto", t.Proto),
			zap.Int64("bytes_up", t.BytesUp()),
			zap.Int64("bytes_down", t.BytesDown()),
			zap.Duration("duration", duration),
			zap.String("reason", t.EndReason()),
		))
	}
}

// userField returns the log field for the user of a tunnel, if there is one.
func userField(t *tunnel.Tunnel) zap.Field {
	if t.User == "" {
		return zap.Skip()
	}
	return textField("user", t.User)
}

// policyField returns the log field for the policy that applied. The directive's own options have no
// name, so they have no field.
func policyField(name string) zap.Field {
	if name == "" {
		return zap.Skip()
	}
	return zap.String("policy", name)
}

// clientField returns the log field for the client.
func clientField(addr netip.Addr) zap.Field {
	return zap.String("client", client.Name(addr))
}

// textField returns a log field for a value that a client or an origin has chosen.
func textField(key, value string) zap.Field { return zap.String(key, printable.Text(value)) }

// errorField returns the log field for an error, which may quote what a peer has sent.
func errorField(err error) zap.Field {
	return zap.String("error", printable.Error(err))
}
