// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package redis shares rate limits between several processes with async_proxy, in Redis,
// Valkey or any other server that speaks their protocol and runs Lua scripts.
//
// A bucket works as it does in memory. The script take.lua takes tokens from it, by the
// server's clock. server.go keeps track of whether the server is available.
package redis

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	asyncproxy "github.com/asyncproxy/caddy-async-proxy"
	"github.com/caddyserver/caddy/v2"
	"github.com/redis/rueidis"
	"go.uber.org/zap"
)

func init() {
	caddy.RegisterModule(Limiter{})
}

// Limiter keeps the buckets of clients in Redis, so that a client has one budget on all
// machines that use the same Redis with the same zone and limits.
//
// Requests that the machine's own bucket denies are denied without asking Redis. While
// Redis does not answer, OnError decides about the others.
type Limiter struct {
	// The addresses of Redis, as host:port or as a host for port 6379: one server, some
	// nodes of a cluster, or the sentinels. Placeholders are replaced.
	Addresses []string `json:"addresses"`

	// The user to authenticate as. Placeholders are replaced. Default: the
	// default user, if there is a password.
	Username string `json:"username,omitempty"`

	// The password to authenticate with. Placeholders are replaced: use
	// `{env.NAME}` or `{file./path}` to keep it out of the config.
	Password string `json:"password,omitempty"`

	// Connects over TLS.
	TLS *TLS `json:"tls,omitempty"`

	// The number of the database. Default: 0, the only one of a cluster.
	DB int `json:"db,omitempty"`

	// The name of the set of servers that the sentinels at Addresses monitor. The user
	// and password are used for the sentinels as well. Default: none; Addresses are
	// servers.
	Sentinel string `json:"sentinel,omitempty"`

	// The prefix of all keys, without spaces and braces. Default: "async_proxy".
	Prefix string `json:"prefix,omitempty"`

	// How long a request waits for Redis. If Redis is slower, it counts as unavailable.
	// Default: 50ms.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// What to do with requests while Redis does not answer: "local" limits clients by
	// this machine's own buckets, "allow" does not limit them, and "deny" refuses all
	// requests with 503. Default: "local".
	OnError string `json:"on_error,omitempty"`

	server    *server
	key       serverKey
	logger    *zap.Logger
	fallbacks interface{ Inc() }
}

// TLS configures the connection over TLS.
type TLS struct {
	// A PEM file with the CA certificates that are trusted to sign the server's
	// certificate. Placeholders are replaced. Default: the CAs that the system trusts.
	CA string `json:"ca,omitempty"`
}

// servers holds the servers in use, by serverKey. Sites share them, and their connections
// and state survive a reload.
var servers = caddy.NewUsagePool()

// serverKey is the settings that two limiters must have in common to share a server.
type serverKey struct {
	addresses, username, password, sentinel string
	tls                                     bool
	ca                                      string // the contents of the file
	db                                      int
	timeout                                 caddy.Duration
}

// CaddyModule returns the Caddy module information.
func (Limiter) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.async_proxy.limiters.redis",
		New: func() caddy.Module { return new(Limiter) },
	}
}

// Provision implements caddy.Provisioner. It does not wait for Redis.
func (l *Limiter) Provision(ctx caddy.Context) error {
	l.Timeout = cmp.Or(l.Timeout, caddy.Duration(50*time.Millisecond))
	l.OnError = cmp.Or(l.OnError, "local")
	l.Prefix = cmp.Or(l.Prefix, "async_proxy")
	if err := l.validate(); err != nil {
		return err
	}
	options, ca, err := l.clientOption()
	if err != nil {
		return err
	}
	if err := registerMetrics(ctx.GetMetricsRegistry()); err != nil {
		return err
	}
	l.fallbacks = metrics.fallbacks.WithLabelValues(l.OnError)

	key := serverKey{
		addresses: strings.Join(options.InitAddress, " "), username: options.Username, password: options.Password,
		sentinel: options.Sentinel.MasterSet, tls: l.TLS != nil, ca: ca, db: l.DB, timeout: l.Timeout,
	}
	l.logger = ctx.Logger()
	pooled, loaded, err := servers.LoadOrNew(key, func() (caddy.Destructor, error) {
		return newServer(options, time.Duration(l.Timeout), l.Prefix, l.logger), nil
	})
	if err != nil {
		return err
	}
	l.server, l.key = pooled.(*server), key
	if loaded {
		l.server.addLogger(l.logger)
	}
	return nil
}

// Cleanup implements caddy.CleanerUpper. It may be called after a failed Provision.
func (l *Limiter) Cleanup() error {
	if l.server == nil {
		return nil
	}
	l.server.removeLogger(l.logger)
	_, err := servers.Delete(l.key)
	return err
}

// Take implements asyncproxy.Limiter.
func (l *Limiter) Take(_ context.Context, b asyncproxy.Bucket) (time.Duration, error) {
	wait, err := l.server.take(l.Prefix, bucketKey(l.Prefix, b), bucketArgs(b.Burst, b.Interval))
	if err == nil {
		return wait, nil
	}
	l.fallbacks.Inc()
	if l.OnError == "deny" {
		return 0, err
	}
	return 0, nil // the machine's own bucket has allowed the request
}

// Suspended implements asyncproxy.Limiter.
func (l *Limiter) Suspended() bool {
	if l.OnError != "allow" || !l.server.down() {
		return false
	}
	l.fallbacks.Inc()
	return true
}

// meanwhile says what happens to requests while Redis does not answer, by OnError.
var meanwhile = map[string]string{
	"local": "each machine limits its clients alone",
	"allow": "clients are not limited",
	"deny":  "every request gets status 503",
}

// Trouble implements asyncproxy.Troubled.
func (l *Limiter) Trouble() string {
	if !l.server.down() {
		return ""
	}
	return "redis does not answer, and " + meanwhile[l.OnError] + " until it does; check the server and the network, the log has the error"
}

// Refill implements asyncproxy.Refiller.
func (l *Limiter) Refill(ctx context.Context, b asyncproxy.Bucket) (bool, error) {
	return l.server.refill(ctx, bucketKey(l.Prefix, b))
}

func (l *Limiter) validate() error {
	switch {
	case len(l.Addresses) == 0:
		return errors.New("addresses: there are none; expected host:port of at least one server")
	case l.Password == "" && l.Username != "":
		return errors.New("username: there is no password; expected one")
	case l.DB < 0:
		return fmt.Errorf("db %d: expected the number of a database, from 0", l.DB)
	case l.Timeout < 0:
		return fmt.Errorf("timeout %v: expected a positive duration", time.Duration(l.Timeout))
	case !validPrefix(l.Prefix):
		return fmt.Errorf("prefix %q: expected a name without spaces and braces", l.Prefix)
	case !validOnError(l.OnError):
		return fmt.Errorf("on_error %q: expected local, allow or deny", l.OnError)
	}
	return nil
}

func validOnError(s string) bool { return s == "local" || s == "allow" || s == "deny" }

func validPrefix(s string) bool { return s != "" && !strings.ContainsAny(s, " \t\r\n{}") }

// expectedAddress describes a valid address in errors.
const expectedAddress = "host:port, and username and password as options"

// hasUser reports whether s looks like a URL or has a user, so that it may contain a
// password and must not be repeated in an error.
func hasUser(s string) bool { return strings.Contains(s, "://") || strings.Contains(s, "@") }

// parseAddress returns the host and port in s. The default port is that of Redis, 6379.
func parseAddress(s string) (address string, ok bool) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port, err = net.SplitHostPort(net.JoinHostPort(strings.Trim(s, "[]"), "6379"))
	}
	if n, err2 := strconv.ParseUint(port, 10, 16); err != nil || err2 != nil || n == 0 || host == "" || strings.ContainsAny(host, " /@") {
		return "", false
	}
	return net.JoinHostPort(host, port), true
}

// clientOption returns the options for the client library, with placeholders replaced. ca
// is the contents of the CA file.
func (l *Limiter) clientOption() (o rueidis.ClientOption, ca string, err error) {
	repl := caddy.NewReplacer()
	for _, s := range l.Addresses {
		if hasUser(s) {
			return o, "", fmt.Errorf("addresses: one of them is a URL or has a user; expected %s", expectedAddress)
		}
		replaced, err := repl.ReplaceOrErr(s, true, true)
		if err != nil {
			return o, "", fmt.Errorf("addresses: %w", err)
		}
		address, ok := parseAddress(replaced)
		if !ok {
			return o, "", fmt.Errorf("addresses %q: expected %s", s, expectedAddress) // not replaced, which may contain a secret
		}
		o.InitAddress = append(o.InitAddress, address)
	}
	if o.Username, err = repl.ReplaceOrErr(l.Username, true, true); err != nil {
		return o, "", fmt.Errorf("username: %w", err)
	}
	if o.Password, err = repl.ReplaceOrErr(l.Password, true, true); err != nil {
		return o, "", errors.New("password: a placeholder in it is empty or unknown") // err may contain a part of the password
	}
	o.SelectDB = l.DB
	if o.TLSConfig, ca, err = l.TLS.config(repl); err != nil {
		return o, "", fmt.Errorf("tls: %w", err)
	}
	if l.Sentinel != "" {
		o.Sentinel = rueidis.SentinelOption{
			MasterSet: l.Sentinel, Username: o.Username, Password: o.Password, TLSConfig: o.TLSConfig,
		}
		o.Sentinel.Dialer.Timeout = setupTimeout
	}
	return o, ca, nil
}

// config returns the TLS config, or nil if TLS is off. ca is the contents of the CA file.
func (t *TLS) config(repl *caddy.Replacer) (config *tls.Config, ca string, err error) {
	if t == nil {
		return nil, "", nil
	}
	config = new(tls.Config)
	if t.CA == "" {
		return config, "", nil
	}
	file, err := repl.ReplaceOrErr(t.CA, true, true)
	if err != nil {
		return nil, "", err
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, "", err
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return nil, "", fmt.Errorf("%s: it contains no PEM certificate", file)
	}
	return config, string(pem), nil
}

// Interface guards
var (
	_ asyncproxy.Limiter  = (*Limiter)(nil)
	_ asyncproxy.Refiller = (*Limiter)(nil)
	_ asyncproxy.Troubled = (*Limiter)(nil)
	_ caddy.Provisioner   = (*Limiter)(nil)
	_ caddy.CleanerUpper  = (*Limiter)(nil)
)
