// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package asyncproxy is a forward proxy as one Caddy directive, async_proxy. It
// limits each client by a token bucket, rewrites the fields of messages as an
// intermediary has to, tunnels CONNECT without decrypting and forwards plain
// HTTP.
//
// A request passes, in this order, the limiter (ratelimit.go), then connect.go
// or forward.go, which both dial through dial.go; what is no proxy request goes
// to the next handler. Answers of the proxy's own are respond.go's, lines and
// counters observe.go's.
package asyncproxy

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/gaissmai/bart"
	"go.uber.org/zap"
)

func init() {
	caddy.RegisterModule(Handler{})
}

// Handler is a forward proxy. It takes CONNECT requests and requests in
// absolute form (`GET http://example.com/ HTTP/1.1`); all others are for this
// server itself: they are not limited, get the same request header fields, and
// go to the next handler.
//
// The site of a forward proxy must have no host name in its address, as a proxy
// request carries the host it is for: use `:8080`, not `proxy.example.com`.
//
// Placeholders for handlers around it, such as log_append:
//
// Placeholder | Description
// ------------|-------------
// `{http.async_proxy.client}` | The client's address
// `{http.async_proxy.user}` | The user, if the client has shown to be one
// `{http.async_proxy.method}` | The method of the request
// `{http.async_proxy.host}` | The host and port that the request is for
// `{http.async_proxy.status}` | The status of the answer; 499 if the client left, or stalled, before it had all of it
// `{http.async_proxy.latency}` | How long the answer took, as a duration
// `{http.async_proxy.reason}` | For an answer of the proxy's own, the error type of RFC 9209
// `{http.async_proxy.message}` | For an answer of the proxy's own, its sentence
// `{http.async_proxy.rule}` | If a rule denied the destination, that rule, such as `deny ads.example.com`; `default` if it is closed by default
// `{http.async_proxy.cause}` | If the proxy refused the request, why: rate_limited, blocked, rule, default, port, client, auth_required, ...
type Handler struct {
	// How many requests a client may make at once, from 1 to 1000000000. A
	// CONNECT is one request, however long its tunnel lives. Default: 10.
	Burst int64 `json:"burst,omitempty"`

	// How many requests a second a client gains, up to Burst: from 0.00001,
	// about one a day, to 1000000. Default: 0.5.
	Refill float64 `json:"refill,omitempty"`

	// How many leading bits of an IPv4 address make a client, from 1 to 32.
	// Default: 32, each address for itself.
	IPv4Prefix int `json:"ipv4_prefix,omitempty"`

	// How many leading bits of an IPv6 address make a client, from 1 to 128.
	// Default: 64, the least that a network assigns to one subscriber.
	IPv6Prefix int `json:"ipv6_prefix,omitempty"`

	// How many clients are tracked at most, at least 2: the bound on the
	// limiter's memory, some 130 bytes each. When more than half as many are
	// active, those that were idle for longest may find a full bucket when they
	// come again. Default: 1000000.
	MaxClients int `json:"max_clients,omitempty"`

	// Handlers with the same zone and the same limits share one budget for each
	// client; another zone is another budget. It also names the policy in the
	// RateLimit fields. Default: "default".
	Zone string `json:"zone,omitempty"`

	// Clients that are never limited, as addresses or CIDR ranges;
	// `private_ranges` stands for all private ones.
	Exempt []string `json:"exempt,omitempty"`

	// Where several processes count their clients together, so that a client
	// has one budget with all of them. It is asked about the requests that this
	// process's own buckets let through. Default: none, each process counts for
	// itself.
	LimiterRaw json.RawMessage `json:"limiter,omitempty" caddy:"namespace=http.async_proxy.limiters inline_key=module"`

	// Where clients may go. Rules are walked in order, and the first that names
	// a destination decides.
	//
	// By default no client gets further than it could without the proxy. A client
	// on this machine reaches all addresses but link-local, multicast and
	// unspecified ones and the metadata services of clouds. All others reach public
	// unicast addresses only, except those of this machine and of the networks that
	// it is in. Whatever is allowed, Caddy's admin endpoint, the status page and the
	// proxy itself stay closed.
	Rules []Rule `json:"rules,omitempty"`

	// The ports that clients may go to at all, as numbers or ranges such as
	// 8000-8999. Default: all but 25.
	Ports []string `json:"ports,omitempty"`

	// The ports that CONNECT may open tunnels to, in place of Ports. Default:
	// those of Ports.
	ConnectPorts []string `json:"connect_ports,omitempty"`

	// What is not enforced but only reported, in log lines: `rules` for rules
	// that deny and for ports, `limits` for burst and refill. What is closed by
	// default stays closed.
	ReportOnly []string `json:"report_only,omitempty"`

	// The only clients that may use the proxy, as addresses or CIDR ranges;
	// `private_ranges` stands for all private ones, loopback included, and `all`
	// opens the proxy to everybody who can reach it. Clients on a Unix socket
	// are always admitted. Default: `all` if there is Authentication, or if a
	// handler or a remote_ip or client_ip matcher before this one restricts who
	// gets here; otherwise `private_ranges`.
	Clients []string `json:"clients,omitempty"`

	// Who may use the proxy: one of these providers must know the user by the
	// credentials in Proxy-Authorization. Default: none, and nobody is asked.
	AuthRaw caddy.ModuleMap `json:"authentication,omitempty" caddy:"namespace=http.authentication.providers"`

	// Whose bucket a request takes its token from: `client_ip`, the client's, or
	// `user`, the user's, which all devices of the user share. Requests without
	// credentials take from the client's bucket in any case. Default: client_ip.
	LimitBy string `json:"limit_by,omitempty"`

	// How many logins of a client may fail in the time of FailedLoginsPer, from 1
	// to 1000000; -1 is no limit. Beyond that a login waits up to 15 seconds for
	// its turn, and is refused with 429 if there is none or it fails. Credentials
	// that were right before are not limited. Default: 10.
	FailedLogins int `json:"failed_logins,omitempty"`

	// The time in which a client may fail to log in FailedLogins times, from 1s to
	// a year. Default: 1m.
	FailedLoginsPer caddy.Duration `json:"failed_logins_per,omitempty"`

	// The proxy to go through. Default: none.
	Upstream *Upstream `json:"upstream,omitempty"`

	// Destinations that are gone to directly, without Upstream, as in a rule.
	// Names are not resolved for this.
	NoUpstream []string `json:"no_upstream,omitempty"`

	// The IP addresses of the DNS servers to ask, such as 192.0.2.53 or
	// tcp/[2001:db8::53]:53. One at random is asked first, and the next one when
	// that fails or has not answered for a second. Default: the system's.
	Resolvers []string `json:"resolvers,omitempty"`

	// The path of a script for the automatic configuration of browsers (PAC),
	// which anybody may read. It sends them to this proxy, except for what is
	// closed by default, such as private addresses. Default: none.
	ServePAC string `json:"serve_pac,omitempty"`

	// What browsers with that script reach directly, too: addresses, CIDR
	// ranges, names, or *.names. Default: nothing.
	PACDirect []string `json:"pac_direct,omitempty"`

	// How long resolving a name and connecting to one of its addresses may take
	// together. Default: 10s.
	DialTimeout caddy.Duration `json:"dial_timeout,omitempty"`

	// How long an origin may take, once it has the request, until the head of
	// its response is there. -1 is for ever. Default: 5m.
	ResponseHeaderTimeout caddy.Duration `json:"response_header_timeout,omitempty"`

	// How long an origin may send nothing in the middle of a response before the
	// response is broken off. A response that has waited for ten seconds counts as
	// a tunnel, in MaxTunnels and MaxTunnelsPerClient, until more of it comes. -1 is
	// for ever. Default: 5m.
	ResponseIdleTimeout caddy.Duration `json:"response_idle_timeout,omitempty"`

	// How many tunnels may be open in this process, those of CONNECT and those
	// of upgraded requests, whichever site opened them. Beyond that the answer
	// is 503. Default: 0, no limit.
	MaxTunnels int `json:"max_tunnels,omitempty"`

	// How many tunnels one client may have open. Beyond that the answer is 429.
	// Default: 0, no limit.
	MaxTunnelsPerClient int `json:"max_tunnels_per_client,omitempty"`

	// How long a tunnel may be silent in both directions before it is closed.
	// Exact to a second. -1 is for ever. Default: 1h.
	TunnelIdleTimeout caddy.Duration `json:"tunnel_idle_timeout,omitempty"`

	// How long one end of a tunnel may take nothing although the other end has sent
	// something for it, before the tunnel is reset. An end that takes something, however
	// slowly, is not stalled. Exact to a second or two. -1 is for ever. Default: 1m.
	TunnelStallTimeout caddy.Duration `json:"tunnel_stall_timeout,omitempty"`

	// How long a tunnel may be open. Exact to a second. Default: 0, for ever.
	TunnelMaxDuration caddy.Duration `json:"tunnel_max_duration,omitempty"`

	// How long after a reload tunnels that were opened before it are closed; 0
	// closes them at once. Default: null, never: a reload leaves tunnels alone.
	StreamCloseDelay *caddy.Duration `json:"stream_close_delay,omitempty"`

	// Whether, when this config starts, the tunnels that were opened before by
	// handlers of the same zone, on a server that listens on one of the same
	// addresses, are checked against its rules, and those closed to whose targets
	// it would not connect. Default: false.
	RecheckTunnels bool `json:"recheck_tunnels,omitempty"`

	// What to change in the fields of requests that are forwarded and of their
	// responses, after everything that the proxy does itself; as in
	// reverse_proxy.
	Headers *headers.Handler `json:"headers,omitempty"`

	// The names of this server itself. Over HTTP/2 and HTTP/3 a request through
	// the proxy looks like one to it; with names given, requests for any other
	// host are forwarded as http, which is what browsers send to an HTTPS proxy
	// for http:// URLs. Default: none, and all such requests go to the next
	// handler.
	Hosts []string `json:"hosts,omitempty"`

	// The pseudonym of this proxy in Via and Proxy-Status, by which it also
	// notices requests that come back to it; "off" leaves Via alone and lets
	// loops be. Default: caddy-async-proxy with a suffix of this process's and
	// site's own.
	Via string `json:"via,omitempty"`

	// Whether the next hop is told who the client is: "auto" sets
	// X-Forwarded-For and X-Real-IP, "off" removes them. Default: "auto".
	ForwardedFor string `json:"forwarded_for,omitempty"`

	logger    *zap.Logger
	events    emitter
	limiter   *limiter
	shared    Limiter // or nil
	policy    string  // the value of RateLimit-Policy
	limited   *atomic.Pointer[limitedAnswer]
	exempt    *bart.Lite
	clients   *bart.Lite  // may use the proxy
	pacDirect *ruleSet    // what the script for browsers sends past the proxy
	guarded   func() bool // something else than clients restricts who may use the proxy
	auth      []authProvider
	basic     *caddyauth.HTTPBasicAuth // the provider, if it is the only one
	hashes    bool                     // http_basic is one of the providers
	failed    *limiter                 // buckets of failed logins; nil: no limit
	dialer    *dialer
	tunnels   *registry
	origins   [reaches]*origins

	contentGrace time.Duration // how long content may be silent before its response counts as a tunnel

	upstreams [reaches]*http2Origins // to https origins that speak HTTP/2

	secureOrigins [reaches]*origins // to those that do not, and for upgrades
	parentOrigins *origins          // to the parent, for requests; nil: it takes none
	via           via
	name          string        // in Proxy-Status
	pacRules      func() string // the script for browsers, but for its head

	running   *atomic.Bool    // its config has started
	wraps     bool            // its server has the listener wrapper, and no other
	config    <-chan struct{} // ends with its config, and is the same for all handlers of that
	addresses []string        // of its server
}

// CaddyModule returns the Caddy module information.
func (Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.async_proxy",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision implements caddy.Provisioner.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.logger = ctx.Logger()
	h.setDefaults()
	h.running, h.config = new(atomic.Bool), ctx.Done()

	var err error
	if h.exempt, err = parsePrefixes("exempt", h.Exempt); err != nil {
		return err
	}
	server, _ := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if err := h.provisionClients(server); err != nil {
		return err
	}
	if h.DialTimeout < 0 {
		return fmt.Errorf("dial_timeout %v: expected a positive duration", time.Duration(h.DialTimeout))
	}
	if h.LimitBy != "client_ip" && h.LimitBy != "user" {
		return fmt.Errorf("limit_by %q: expected client_ip or user", h.LimitBy)
	}
	for _, what := range h.ReportOnly {
		if what != "rules" && what != "limits" {
			return fmt.Errorf("report_only %q: expected rules or limits", what)
		}
	}
	if h.ServePAC != "" && h.ServePAC[0] != '/' {
		return fmt.Errorf("serve_pac %q: expected a path that begins with /", h.ServePAC)
	}
	if len(h.PACDirect) > 0 && h.ServePAC == "" {
		return errors.New("pac_direct: expected serve_pac to be set as well")
	}
	if h.pacDirect, err = newPACDirect(h.PACDirect); err != nil {
		return fmt.Errorf("pac_direct: %w", err)
	}
	if err := h.loadAuth(ctx); err != nil {
		return err
	}
	if h.LimitBy == "user" && len(h.auth) == 0 {
		return errors.New("limit_by \"user\" requires authentication")
	}
	if h.ForwardedFor != "auto" && h.ForwardedFor != "off" {
		return fmt.Errorf("forwarded_for %q: expected auto or off", h.ForwardedFor)
	}
	if h.Headers != nil {
		if err := checkHeaders(h.Headers); err != nil {
			return fmt.Errorf("headers: %w", err)
		}
		if err := h.Headers.Provision(ctx); err != nil {
			return fmt.Errorf("headers: %w", err)
		}
		if err := h.Headers.Validate(); err != nil {
			return fmt.Errorf("headers: %w", err)
		}
	}
	raiseHeadLimit(server)
	if err := h.provisionName(server); err != nil {
		return err
	}
	if err := registerMetrics(ctx.GetMetricsRegistry()); err != nil {
		return err
	}
	if h.events, err = newEmitter(ctx); err != nil {
		return err
	}
	if err := h.provisionDialer(ctx, server); err != nil {
		return err
	}
	for r := range reaches {
		dial := func(ctx context.Context, authority string) (net.Conn, error) {
			conn, err := h.dialer.dial(ctx, r, authority)
			if tcp, ok := conn.(*net.TCPConn); ok {
				keepAlive(tcp) // may be idle at once
			}
			return conn, err
		}
		h.origins[r], h.secureOrigins[r] = newOrigins(dial), newOrigins(overTLS(dial, "http/1.1"))
		if h.upstreams[r], err = newHTTP2Origins(dial, h.secureOrigins[r]); err != nil {
			return err
		}
		recheck := func(ctx context.Context, authority string, conn net.Conn, to netip.AddrPort) error {
			return h.judgeAgain(ctx, r, authority, conn, to)
		}
		recheckConn := func(ctx context.Context, c *originConn) error { return recheck(ctx, c.authority, c.Conn, c.to) }
		h.origins[r].recheck, h.secureOrigins[r].recheck, h.upstreams[r].recheck = recheckConn, recheckConn, recheck
	}
	if err := h.validateTunnels(); err != nil {
		return err
	}
	if err := h.loadLimiter(ctx); err != nil {
		return err
	}

	// Late, since what is taken here must be given back.
	key := h.limiterKey()
	if err := key.validate(); err != nil {
		return err
	}
	pooled, _, err := limiters.LoadOrNew(key, func() (caddy.Destructor, error) { return newLimiter(key), nil })
	if err != nil {
		return err
	}
	h.limiter = pooled.(*limiter)
	if err := h.provisionFailedLogins(); err != nil {
		return err
	}
	h.policy, h.limited = h.limiter.policy(), new(atomic.Pointer[limitedAnswer])
	if h.tunnels, err = acquireRegistry(); err != nil {
		return err
	}
	h.tunnels.handlers.Store(h, struct{}{})
	return h.atStart(ctx, server)
}

// Cleanup implements caddy.CleanerUpper. It may follow a Provision that failed.
func (h *Handler) Cleanup() error {
	for r := range reaches {
		if h.origins[r] != nil {
			h.origins[r].close()
			h.secureOrigins[r].close()
			h.upstreams[r].close()
		}
	}
	if h.parentOrigins != nil {
		h.parentOrigins.close()
	}
	if h.dialer != nil && h.dialer.parent != nil {
		h.dialer.parent.close()
	}
	var err error
	if h.tunnels != nil {
		h.tunnels.handlers.Delete(h)
		h.closeTunnelsLater()
		err = releaseRegistry()
	}
	if h.limiter != nil {
		_, err2 := limiters.Delete(h.limiter.key)
		err = errors.Join(err, err2)
	}
	if h.failed != nil {
		_, err2 := failedLogins.Delete(h.failed.key)
		err = errors.Join(err, err2)
	}
	return err
}

// provisionDialer makes the ways out: the rules, the resolver, the parent.
func (h *Handler) provisionDialer(ctx caddy.Context, server *caddyhttp.Server) error {
	own := &ownListeners{ctx, server, h.running}
	p := &policy{own: own.at, reportOnly: slices.Contains(h.ReportOnly, "rules")}
	var err error
	if p.ports, err = parsePortList("ports", h.Ports); err != nil {
		return err
	}
	if p.connect, err = parsePortList("connect_ports", h.ConnectPorts); err != nil {
		return err
	}
	check := &ruleCheck{open: p.openPorts()}
	if p.sets, err = newRuleSets(h.Rules, loadSource(ctx), check); err != nil {
		return err
	}
	if err := check.report(h.Rules, p.sets, h.logger); err != nil {
		return err
	}
	p.changing = p.reportOnly || slices.ContainsFunc(p.sets, func(s *ruleSet) bool { return len(s.sources) > 0 })
	resolver, err := newResolver(h.Resolvers)
	if err != nil {
		return err
	}
	h.dialer = newDialer(p, time.Duration(h.DialTimeout), resolver)
	h.dialer.report, h.dialer.ownPort = h.logReported, own.atPort
	h.pacRules = sync.OnceValue(h.makePACRules)
	if h.Upstream == nil {
		if len(h.NoUpstream) > 0 {
			return errors.New("no_upstream: no upstream is configured")
		}
		return nil
	}
	if h.dialer.direct, err = newDirectSet(h.NoUpstream); err != nil {
		return fmt.Errorf("no_upstream: %w", err)
	}
	if h.dialer.parent, err = newParent(ctx, h.Upstream, time.Duration(h.DialTimeout), h.dialer.connector); err != nil {
		return fmt.Errorf("upstream: %w", err)
	}
	if h.Upstream.hasLiteralSecret() {
		h.logger.Warn("the option upstream has a password or a key written out, which Caddy's debug log and admin endpoint show with the rest of the config; " +
			"use a placeholder such as {env.PROXY_PASSWORD} or {file./run/secrets/proxy}")
	}
	if parent := h.dialer.parent; parent.takesRequests() {
		h.parentOrigins = newOrigins(func(ctx context.Context, _ string) (net.Conn, error) {
			start := time.Now()
			conn, err := parent.dial(ctx)
			countDial(ctx, start, err)
			return conn, err
		})
	}
	return nil
}

// judgeAgain judges a connection that was opened for another request of a client of reach
// r. Verdicts stay the same unless the rules can change, or the connection leads to this
// machine (then to is valid), where a listener that no client may reach may have opened.
func (h *Handler) judgeAgain(ctx context.Context, r reach, authority string, conn net.Conn, to netip.AddrPort) error {
	p := h.dialer.policy
	if p.changing || to.IsValid() && p.own != nil && p.own(to) {
		return h.dialer.again(ctx, r, authority, conn)
	}
	return nil
}

// idleConnections returns how many connections wait for another request.
func (h *Handler) idleConnections() int {
	n := 0
	for r := range reaches {
		n += int(h.origins[r].count.Load()+h.secureOrigins[r].count.Load()) + h.upstreams[r].count()
	}
	if h.parentOrigins != nil {
		n += int(h.parentOrigins.count.Load())
	}
	return n
}

// maxTimeout is some 36 years.
const maxTimeout = caddy.Duration(1 << 60)

func (h *Handler) setDefaults() {
	h.Burst = cmp.Or(h.Burst, 10)
	h.Refill = cmp.Or(h.Refill, 0.5)
	h.IPv4Prefix = cmp.Or(h.IPv4Prefix, 32)
	h.IPv6Prefix = cmp.Or(h.IPv6Prefix, 64)
	h.MaxClients = cmp.Or(h.MaxClients, 1_000_000)
	h.Zone = cmp.Or(h.Zone, "default")
	h.DialTimeout = cmp.Or(h.DialTimeout, caddy.Duration(10*time.Second))
	h.ForwardedFor = cmp.Or(h.ForwardedFor, "auto")
	h.LimitBy = cmp.Or(h.LimitBy, "client_ip")
	h.FailedLogins = cmp.Or(h.FailedLogins, 10)
	h.FailedLoginsPer = cmp.Or(h.FailedLoginsPer, caddy.Duration(time.Minute))
	h.ResponseHeaderTimeout = cmp.Or(h.ResponseHeaderTimeout, caddy.Duration(5*time.Minute))
	h.ResponseIdleTimeout = cmp.Or(h.ResponseIdleTimeout, caddy.Duration(5*time.Minute))
	// Longer ones are no different, but what is added to them could overflow.
	h.ResponseHeaderTimeout = min(h.ResponseHeaderTimeout, maxTimeout)
	h.ResponseIdleTimeout = min(h.ResponseIdleTimeout, maxTimeout)
	h.contentGrace = contentGrace
	h.TunnelIdleTimeout = cmp.Or(h.TunnelIdleTimeout, caddy.Duration(time.Hour))
	h.TunnelStallTimeout = cmp.Or(h.TunnelStallTimeout, caddy.Duration(time.Minute))
}

func (h *Handler) limiterKey() limiterKey {
	return limiterKey{
		zone: h.Zone, burst: h.Burst, refill: h.Refill,
		v4: h.IPv4Prefix, v6: h.IPv6Prefix, maxClients: h.MaxClients,
	}
}

// parsePrefixes reads the addresses and CIDR ranges of an option.
func parsePrefixes(option string, exprs []string) (*bart.Lite, error) {
	table := new(bart.Lite)
	for _, expr := range exprs {
		for _, cidr := range expandRanges(expr) {
			prefix, err := parsePrefix(cidr)
			if bits := checkHostBits(cidr); bits != nil {
				return nil, fmt.Errorf("%s: %w", option, bits)
			}
			if err != nil {
				return nil, fmt.Errorf("%s %q: expected an address, a CIDR range such as 10.0.0.0/8, or private_ranges", option, expr)
			}
			table.Insert(prefix)
		}
	}
	return table, nil
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	r.Host = withoutUser(r.Host) // RequestURI still has the password, and the request is refused for it
	v := h.newVisit(r)
	switch {
	case r.Method == http.MethodConnect && !isExtendedConnect(r):
		v.kind = kindTunnel
	case h.isProxyRequest(r):
		v.kind = kindForward
	default:
		v.kind = kindOther
	}
	if v.kind != kindOther {
		delete(w.Header(), "Alt-Svc") // says where this server is to be found, which is not the host that is asked for
	}
	v.bucket = h.limiter.client(v.addr)
	return h.finish(w, r, v, h.serveOrNote(w, r, v, next))
}

// serveOrNote is serve, after a panic in which the request is counted and logged as
// one that failed. The panic goes on.
func (h *Handler) serveOrNote(w http.ResponseWriter, r *http.Request, v *visit, next caddyhttp.Handler) error {
	defer func() {
		if p := recover(); p != nil {
			err := brokenOff{fmt.Errorf("panic: %v", p)}
			if v.status == 0 && p != http.ErrAbortHandler {
				v.status = http.StatusInternalServerError
			}
			v.count(err)
			h.logRequest(r, v, err)
			panic(p)
		}
	}()
	return h.serve(w, r, v, next)
}

// errLimited is of a request that the limiter has refused, by the visit's verdict.
var errLimited = errors.New("denied by the rate limiter")

// serve does what a request asks for, or says why not.
func (h *Handler) serve(w http.ResponseWriter, r *http.Request, v *visit, next caddyhttp.Handler) (err error) {
	withLogin := v.kind != kindOther && len(h.auth) > 0
	if !withLogin {
		if err := h.charge(r, v); err != nil {
			return err
		}
	}
	if f := h.turnAway(r, v); f != nil {
		if withLogin {
			if err := h.charge(r, v); err != nil {
				return err
			}
		}
		return f
	}
	if withLogin {
		if err := h.login(w, r, v); err != nil {
			return err
		}
	}
	switch v.kind {
	case kindTunnel:
		v.status, err = h.connect(w, r, v)
	case kindForward:
		v.status, err = h.forward(w, r, v.caller)
	default:
		if h.isPAC(r) {
			v.status = h.servePAC(w, r)
		} else {
			v.status, err = h.passOn(w, r, v.caller, next)
		}
	}
	return err
}

// turnAway refuses requests that are not let into the proxy, whoever the user is.
func (h *Handler) turnAway(r *http.Request, v *visit) *refusal {
	if h.via.seen(r.Header) || h.loops(r, v.peer) {
		return causeLoop.refusal(nil, h.name)
	}
	if v.kind != kindOther && !h.admits(v.addr) {
		return causeClient.refusal(&deniedError{rule: "clients", why: "the client's address is not in clients " + strings.Join(h.effectiveClients(), " ")}, v.addr)
	}
	return nil
}

// login authenticates the user, and then takes the token for the request: with
// limit_by user from the user's bucket, else from the client's. A challenge costs
// the client a token as well. A failed login costs none, as it is counted in a
// bucket of its own: a job with an old password would otherwise use up the tokens
// of everybody behind the same address.
func (h *Handler) login(w http.ResponseWriter, r *http.Request, v *visit) error {
	now := sinceEpoch(v.start)
	if wait := h.tunnels.blocked(v.bucket, now); wait > 0 {
		v.verdict = h.limiter.block(v.bucket, now, wait)
		return errLimited
	}
	client := v.bucket
	err := h.authenticate(w, r, v)
	failed := err != nil && hasCredentials(r)
	if failed || v.user != "" && h.LimitBy == "user" {
		h.limiter.bucket(client, now).came(now) // a request of the client's as well
	}
	if failed {
		return err
	}
	if v.user != "" && h.LimitBy == "user" {
		v.bucket = userKey(v.user)
	}
	if limited := h.charge(r, v); limited != nil {
		delete(w.Header(), "Proxy-Authenticate") // logging in would not help now
		return limited
	}
	return err
}

// finish counts and logs a request, and answers it if nobody else has.
func (h *Handler) finish(w http.ResponseWriter, r *http.Request, v *visit, err error) error {
	if err == errLimited {
		if err := h.refuseLimited(w, r, v, v.verdict); err != nil {
			return err
		}
		h.closeInStages(w, r, v.addr)
		return nil
	}
	f := v.count(err)
	if f == nil {
		if failed := new(caddyhttp.HandlerError); v.status == 0 && errors.As(err, failed) {
			v.status = failed.StatusCode // which Caddy answers with
		}
		h.logRequest(r, v, err)
		if errors.Is(err, http.ErrAbortHandler) {
			if r.ProtoMajor == 1 && r.ProtoMinor == 0 {
				resetConnection(w) // whose orderly end would be that of the answer
			}
			panic(http.ErrAbortHandler) // the answer breaks off, or a stream is reset
		}
		return err
	}
	v.refusedBy(f)
	// A client that left was not refused, and a challenge is not a refusal.
	if f.status != statusClientClosedRequest && v.cause != causeAuthRequired {
		v.addRecent(f)
	}
	h.logRequest(r, v, f.err)
	if f.status == statusClientClosedRequest {
		panic(http.ErrAbortHandler) // nobody is there
	}
	if err := h.answer(w, r, f); err != nil {
		return err
	}
	h.closeInStages(w, r, v.addr)
	return nil
}

// charge takes a token for v, or returns errLimited, with the reason in the
// visit's verdict.
func (h *Handler) charge(r *http.Request, v *visit) error {
	if v.verdict = h.take(r, v); !v.verdict.ok {
		return errLimited
	}
	return nil
}

// take takes a token for v. Requests for this server itself, such as health
// checks, are not limited: a client that has used up its tokens can still fetch
// the PAC script.
func (h *Handler) take(r *http.Request, v *visit) verdict {
	now := sinceEpoch(v.start)
	if wait := h.tunnels.blocked(v.bucket, now); wait > 0 {
		return h.limiter.block(v.bucket, now, wait)
	}
	if v.kind == kindOther || h.exempt.Contains(v.addr) {
		return verdict{ok: true}
	}
	return h.orReport(r, v, h.ask(r.Context(), v.bucket, now))
}

// orReport lets a refusal be, and reports it, if limits are not enforced.
func (h *Handler) orReport(r *http.Request, v *visit, verdict verdict) verdict {
	if !verdict.ok && slices.Contains(h.ReportOnly, "limits") {
		if !v.reported {
			metrics.reported.WithLabelValues("limits").Inc()
			v.reported = true
		}
		if verdict.refused > 0 {
			h.logLimited(r, v, verdict, true)
		}
		verdict.ok = true
	}
	return verdict
}

// loops reports whether r comes over this proxy's own connection to a target.
func (h *Handler) loops(r *http.Request, peer netip.AddrPort) bool {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return h.tunnels.loops(h.name, peer, local)
}

// caller is who sent a request.
type caller struct {
	addr    netip.Addr     // the client, after Caddy's trusted_proxies; v4-mapped is v4
	user    string         // who the client has shown to be, or ""
	bucket  netip.Addr     // what it shares its limits with
	peer    netip.AddrPort // the other end of the connection
	trusted bool           // the peer is a trusted proxy
	reach   reach
}

// callerOf finds out who sent r. On a Unix socket there are no addresses: all
// that come that way are one client, unless the peer is trusted and names them.
func callerOf(r *http.Request) caller {
	var c caller
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		c.peer = netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
	}
	if own, ok := r.Context().(*requestContext); ok && !own.namesClient() {
		c.addr = c.peer.Addr()
	} else {
		if s, ok := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string); ok {
			if addr, err := netip.ParseAddr(s); err == nil {
				c.addr = addr.Unmap().WithZone("")
			}
		}
		c.trusted, _ = caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool)
	}
	// Whoever speaks for others is not on this machine only because the
	// balancer or proxy in front of it is.
	if c.addr.IsLoopback() && c.peer.Addr().IsLoopback() &&
		len(r.Header["X-Forwarded-For"]) == 0 && len(r.Header["Forwarded"]) == 0 && len(r.Header["Via"]) == 0 {
		c.reach = local
	}
	return c
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.CleanerUpper          = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
