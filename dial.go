// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
)

// A reach is how far a client may go through the proxy: no further than it
// could without it.
type reach int

const (
	public reach = iota // to public unicast addresses: any client on the Internet can go there
	local               // to this machine and its networks too: a client on this machine can
	reaches
)

// portSMTP is denied always: an open relay for mail is what a forward proxy is
// abused for first.
const portSMTP = 25

// dialer opens connections to targets and decides which addresses may be one.
// It judges the address that is about to be connected to, after resolution:
// there is no name, no spelling of an address and no second answer of a
// resolver that it would not see.
type dialer struct {
	allow   []netip.Prefix            // beyond what the reach of a client allows
	own     func(netip.AddrPort) bool // listeners of this process that nobody may be taken to
	dialers [reaches]net.Dialer
}

// newDialer makes a dialer that gives up after timeout, which covers
// resolution and all addresses of a name together.
func newDialer(timeout time.Duration, allow []netip.Prefix, own func(netip.AddrPort) bool) *dialer {
	d := &dialer{allow: allow, own: own}
	for r := range reaches {
		d.dialers[r] = net.Dialer{
			Timeout: timeout,
			// A target that is gone without a word is noticed after two minutes.
			KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4},
			ControlContext: func(ctx context.Context, _, address string, _ syscall.RawConn) error {
				to, err := netip.ParseAddrPort(address)
				if err != nil {
					return err
				}
				denied := d.check(r, to)
				if denied == nil {
					return nil
				}
				if found, ok := ctx.Value(deniedKey{}).(*atomic.Pointer[deniedError]); ok {
					found.Store(denied)
				}
				return denied
			},
		}
	}
	return d
}

// dial connects to address, a host and a port, for a client of the given reach.
// All addresses of a name are tried, IPv6 and IPv4 side by side (RFC 8305). It
// ends when ctx does. If it fails and one of the addresses was denied, that is
// the error, whatever came of the others.
func (d *dialer) dial(ctx context.Context, r reach, address string) (net.Conn, error) {
	var found atomic.Pointer[deniedError]
	conn, err := d.dialers[r].DialContext(context.WithValue(ctx, deniedKey{}, &found), "tcp", address)
	if denied := found.Load(); err != nil && denied != nil && ctx.Err() == nil {
		return nil, denied
	}
	return conn, err
}

// deniedKey is for the context of a dial, in which it finds its deniedError.
type deniedKey struct{}

// deniedError says that the policy forbids an address.
type deniedError struct {
	to  netip.AddrPort
	why string // for the person at the other end
}

func (e *deniedError) Error() string { return fmt.Sprintf("%s is denied: %s", e.to, e.why) }

// check returns a deniedError if a client of reach r may not be connected to to.
func (d *dialer) check(r reach, to netip.AddrPort) *deniedError {
	ip := to.Addr().WithZone("").Unmap()
	target := embedded(ip)
	switch {
	case to.Port() == portSMTP:
		return &deniedError{to, "port 25 is for mail and closed to clients of a proxy"}
	case d.own != nil && d.own(netip.AddrPortFrom(target, to.Port())):
		return &deniedError{to, "it is an address of the proxy itself"}
	case contains(d.allow, ip), contains(d.allow, target), r.includes(target):
		return nil
	case r == local:
		return &deniedError{to, "it is no address of one host; the option allow would open it"}
	default:
		return &deniedError{to, "it is not public; the option allow would open it"}
	}
}

// includes reports whether ip is within reach. ip is not v4-mapped, has no zone
// and embeds no other address.
func (r reach) includes(ip netip.Addr) bool {
	if r == local {
		return !contains(notLocal, ip)
	}
	if ip.Is4() {
		return !contains(notPublic4, ip)
	}
	return globalUnicast6.Contains(ip) && !contains(notPublic6, ip)
}

// What is not a public unicast address, after the special-purpose registries of
// IANA (RFC 6890), and Azure's 168.63.129.16, which belongs to the machine's
// host. For IPv6 everything beyond global unicast is not. notLocal
// is what even this machine's own users have no business with: the unspecified
// addresses, which are this machine under another name; link-local, where
// clouds keep their credentials; multicast and broadcast.
var (
	globalUnicast6 = netip.MustParsePrefix("2000::/3")

	notPublic4 = prefixes("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
		"172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
		"168.63.129.16/32", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4")
	notPublic6 = prefixes("2001::/23", "2001:db8::/32", "3fff::/20")
	notLocal   = prefixes("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32",
		"::/128", "fe80::/10", "ff00::/8", "2001::/32")

	nat64 = netip.MustParsePrefix("64:ff9b::/96") // RFC 6052
	sixTo = netip.MustParsePrefix("2002::/16")    // RFC 3056
)

// embedded returns the IPv4 address inside an IPv6 one that leads there through
// a translator or a relay, else ip itself.
func embedded(ip netip.Addr) netip.Addr {
	b := ip.As16()
	switch {
	case nat64.Contains(ip):
		return netip.AddrFrom4([4]byte(b[12:16]))
	case sixTo.Contains(ip):
		return netip.AddrFrom4([4]byte(b[2:6]))
	}
	return ip
}

func prefixes(cidrs ...string) []netip.Prefix {
	list := make([]netip.Prefix, len(cidrs))
	for i, c := range cidrs {
		list[i] = netip.MustParsePrefix(c)
	}
	return list
}

func contains(list []netip.Prefix, ip netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// statusClientClosedRequest is for logs only: the client left before there was
// an answer. The number is nginx's.
const statusClientClosedRequest = 499

// dialRefusal says to the client why there is no connection to host. ctx is
// the request's.
func dialRefusal(ctx context.Context, err error, host string) *refusal {
	var denied *deniedError
	var dns *net.DNSError
	var timeout net.Error
	switch {
	case ctx.Err() != nil:
		return refuse(statusClientClosedRequest, "connection_terminated", context.Cause(ctx), "the client left")
	case errors.As(err, &denied):
		kind := "destination_ip_prohibited"
		if denied.to.Port() == portSMTP {
			kind = "http_request_denied"
		}
		return refuse(http.StatusForbidden, kind, err, "%s is out of bounds for this proxy's clients: %s.", host, denied.why)
	case errors.As(err, &dns) && dns.IsTimeout:
		return refuse(http.StatusGatewayTimeout, "dns_timeout", err, "The name of %s was not resolved in time.", host)
	case errors.As(err, &dns):
		return refuse(http.StatusBadGateway, "dns_error", err, "The name of %s does not resolve.", host)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return refuse(http.StatusGatewayTimeout, "connection_timeout", err, "%s did not accept a connection in time.", host)
	case errors.Is(err, syscall.ECONNREFUSED):
		return refuse(http.StatusBadGateway, "connection_refused", err, "%s refused the connection.", host)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return refuse(http.StatusBadGateway, "destination_ip_unroutable", err, "There is no route to %s.", host)
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.EADDRNOTAVAIL):
		return refuse(http.StatusServiceUnavailable, "proxy_internal_error", err, "This proxy has no room for another connection; try again later.")
	default:
		return refuse(http.StatusBadGateway, "destination_unavailable", err, "There is no connection to %s.", host)
	}
}
