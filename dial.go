// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// dialer opens connections to targets, or through a parent proxy, and asks the
// policy which addresses may be one. It judges the address that is about to be
// connected to, after resolution: there is no name, no spelling of an address
// and no second answer of a resolver that it would not see.
type dialer struct {
	policy    *policy
	timeout   time.Duration
	parent    *parent           // nil: none
	direct    *ruleSet          // what is not for the parent
	ownPort   func(uint16) bool // whether one of our listeners that are closed to all has a port; may be nil
	dialers   [reaches]net.Dialer
	connector *connector
	report    func(ctx context.Context, target string, reported *deniedError)
}

// newDialer makes a dialer that gives up after timeout, which covers
// resolution and all addresses of a name together.
func newDialer(p *policy, timeout time.Duration, resolver *resolver) *dialer {
	d := &dialer{policy: p, timeout: timeout, connector: newConnector(resolver)}
	resolver.limit(timeout)
	for r := range reaches {
		d.dialers[r] = net.Dialer{
			Timeout:   timeout,
			KeepAlive: -1, // see keepAlive
			ControlContext: func(ctx context.Context, _, address string, _ syscall.RawConn) error {
				to, err := netip.ParseAddrPort(address)
				if err != nil {
					return err
				}
				a := ctx.Value(attemptKey{}).(*attempt)
				denied, reported := p.check(ctx, r, a.target, to)
				if denied != nil {
					a.denied.Store(denied)
				}
				return d.verdict(ctx, a.address, denied, reported)
			},
		}
	}
	return d
}

// keepAlive has it noticed after two minutes that the other end of a connection
// is gone without a word. That takes four system calls, which those that end
// before have no use for.
func keepAlive(conn *net.TCPConn) {
	_ = conn.SetKeepAliveConfig(keepAliveConfig)
}

var keepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

// attempt is a dial, as the checks of its addresses see it.
type attempt struct {
	target
	address string
	denied  atomic.Pointer[deniedError] // the last that was
}

// attemptKey is for the context of a dial, in which it finds its attempt.
type attemptKey struct{}

// dial connects to address, a host and a port, for a client of the given reach:
// through the parent, if there is one for it. The addresses of a name are tried
// as RFC 8305 says. It ends when ctx does. If it fails and one of the addresses
// was denied, that is the error, whatever came of the others.
func (d *dialer) dial(ctx context.Context, r reach, address string) (conn net.Conn, err error) {
	start := time.Now()
	defer func() { countDial(ctx, start, err) }()
	if d.usesParent(address) {
		if err := d.checkUnresolved(ctx, r, address); err != nil {
			return nil, err
		}
		return d.parent.connect(ctx, address)
	}
	a := &attempt{target: newTarget(address), address: address}
	if denied, _ := d.policy.checkName(ctx, r, a.target, true); denied != nil {
		return nil, denied
	}
	conn, err = d.open(context.WithValue(ctx, attemptKey{}, a), &d.dialers[r], a.target)
	if denied := a.denied.Load(); err != nil && denied != nil && !errors.Is(ctx.Err(), context.Canceled) {
		return nil, denied
	}
	if err != nil {
		return nil, err
	}
	// A listener may have been opened between the check of the address and the
	// connection, as the admin endpoint's is in a reload.
	if denied := d.policy.checkOwn(addrPort(conn.RemoteAddr())); denied != nil {
		_ = conn.Close()
		return nil, denied
	}
	return conn, nil
}

// open connects to an address, or to those of a name. The name is made fully
// qualified by a dot at the end: a search list of the system's would make another
// one of it, which no rule has judged.
func (d *dialer) open(ctx context.Context, dialer *net.Dialer, t target) (net.Conn, error) {
	if t.addr.IsValid() {
		return dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(t.addr, t.port).String())
	}
	if !strings.Contains(t.name, ".") { // the hosts file has such names without one
		if addrs, err := hostsFile.LookupNetIP(ctx, "ip", t.name); err == nil {
			return d.connector.dialAddresses(ctx, dialer, hostPort{t.name, t.port}, addrs)
		}
	}
	if t.name == "localhost" { // is known to most systems without a dot only
		return d.connector.dial(ctx, dialer, t.name, t.port)
	}
	return d.connector.dial(ctx, dialer, t.name+".", t.port)
}

// hostsFile is a resolver that knows what is in the system's hosts file, and
// asks nobody.
var hostsFile = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
	return nil, errors.New("no DNS server is configured")
}}

// usesParent reports whether connections to address go through the parent.
func (d *dialer) usesParent(address string) bool {
	if d.parent == nil {
		return false
	}
	t := newTarget(address)
	_, direct := d.direct.matchName(t)
	if !direct && t.addr.IsValid() {
		ip := t.addr.Unmap()
		_, direct = d.direct.matchAddress(context.Background(), ip, embedded(ip))
	}
	return !direct
}

// checkUnresolved judges a target that is for the parent to resolve. One on this
// machine may make an address of this machine of any name.
func (d *dialer) checkUnresolved(ctx context.Context, r reach, address string) error {
	t := newTarget(address)
	if t.name != "" && d.ownPort != nil && d.ownPort(t.port) && d.parent.isHere(ctx) {
		return &deniedError{kind: deniedAddress, why: "its port is reserved",
			hint: "the parent proxy on this machine could resolve the name to it; add the name to no_upstream, so that it is resolved here"}
	}
	denied, reported := d.policy.checkName(ctx, r, t, false)
	return d.verdict(ctx, address, denied, reported)
}

// verdict reports what is only to be reported, and returns what is denied.
func (d *dialer) verdict(ctx context.Context, address string, denied, reported *deniedError) error {
	if reported != nil {
		d.report(ctx, address, reported)
	}
	if denied != nil {
		return denied
	}
	return nil
}

// forbids reports whether a tunnel that is open would not be opened now.
func (d *dialer) forbids(t *tunnel) bool {
	ctx := context.Background()
	if strings.HasPrefix(t.proto, "HTTP/") { // and not what a request was upgraded to
		ctx = context.WithValue(ctx, connectKey{}, true)
	}
	if d.usesParent(t.target) {
		return d.checkUnresolved(ctx, t.reach, t.target) != nil
	}
	denied, _ := d.policy.check(ctx, t.reach, newTarget(t.target), t.address)
	return denied != nil
}

// again judges a connection that was opened for another request of a client of
// reach r.
func (d *dialer) again(ctx context.Context, r reach, address string, conn net.Conn) error {
	if d.usesParent(address) {
		return d.checkUnresolved(ctx, r, address)
	}
	denied, reported := d.policy.check(ctx, r, newTarget(address), addrPort(conn.RemoteAddr()))
	return d.verdict(ctx, address, denied, reported)
}

// requestOf returns the request that a context is of, as the client sent it.
func requestOf(ctx context.Context) *http.Request {
	if r, ok := ctx.Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok {
		return &r
	}
	return new(http.Request)
}

// statusClientClosedRequest is for logs only: the client left before there was
// an answer, or all of it. The number is nginx's.
const statusClientClosedRequest = 499

// clientLeft is for a client that gets no answer, or none any more.
func clientLeft(err error) *refusal {
	return refuse(statusClientClosedRequest, "connection_terminated", err, "the client left")
}

// dialRefusal says to the client why there is no connection to host. ctx is
// the request's.
func dialRefusal(ctx context.Context, err error, host string) *refusal {
	var denied *deniedError
	var unresolved *resolveError
	var timeout net.Error
	var parent *parentError
	switch {
	case ctx.Err() != nil:
		return clientLeft(context.Cause(ctx))
	case errors.As(err, &denied):
		return refuse(http.StatusForbidden, denied.kind, err, "%s", denied.text(host))
	case errors.As(err, &parent):
		return parent.refusal(ctx, host)
	case isTLSError(err):
		return tlsRefusal(err, host)
	case noDescriptors(err):
		return noRoom(err)
	case errors.As(err, &unresolved):
		return unresolved.refusal(err, host)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return refuse(http.StatusGatewayTimeout, "connection_timeout", err, "%s did not accept a connection in time.", host)
	case errors.Is(err, syscall.ECONNREFUSED):
		return refuse(http.StatusBadGateway, "connection_refused", err, "%s refused the connection.", host)
	case isUnroutable(err):
		return refuse(http.StatusBadGateway, "destination_ip_unroutable", err, "There is no route to %s.", host)
	case errors.Is(err, syscall.EADDRNOTAVAIL): // all ports are taken
		return noRoom(err)
	default:
		return refuse(http.StatusBadGateway, "destination_unavailable", err, "Could not connect to %s.", host)
	}
}

// noRoom says that this proxy cannot open another connection now.
func noRoom(err error) *refusal {
	return refuse(http.StatusServiceUnavailable, "proxy_internal_error", err, "This proxy cannot open another connection now; try again later.")
}
