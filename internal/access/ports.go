// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// PortSMTP is denied unless the option ports lists it: sending spam is the most common
// abuse of a forward proxy.
const PortSMTP = 25

// PortRange is the ports from low to high; the zero value is all ports.
type PortRange struct{ Low, High uint16 }

func (p PortRange) contains(port uint16) bool { return p.High == 0 || p.Low <= port && port <= p.High }

func (p PortRange) String() string {
	switch {
	case p.High == 0:
		return ""
	case p.Low == p.High:
		return strconv.Itoa(int(p.Low))
	}
	return fmt.Sprintf("%d-%d", p.Low, p.High)
}

// ParsePorts parses a port or a range of ports such as 8000-8999.
func ParsePorts(s string) (PortRange, error) {
	from, to, ranged := strings.Cut(s, "-")
	if !ranged {
		to = from
	}
	low, err := strconv.ParseUint(from, 10, 16)
	high, err2 := strconv.ParseUint(to, 10, 16)
	if err != nil || err2 != nil || low == 0 || high < low {
		return PortRange{}, fmt.Errorf("%q is neither a port from 1 to 65535 nor a range of ports such as 8000-8999", s)
	}
	return PortRange{uint16(low), uint16(high)}, nil
}

// ParsePortList parses the ports of an option.
func ParsePortList(option string, texts []string) (list []PortRange, err error) {
	for _, text := range texts {
		ports, err := ParsePorts(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", option, err)
		}
		list = append(list, ports)
	}
	return list, nil
}

// connectKey is the context key that marks the dial of a CONNECT.
type connectKey struct{}

// WithConnect marks ctx as the context of the dial of a CONNECT, for which the option
// connect_ports may open other ports.
func (c *Control) WithConnect(ctx context.Context) context.Context {
	if c.Connect == nil {
		return ctx
	}
	return context.WithValue(ctx, connectKey{}, true)
}

// PortsFor returns the ports that are open, and the name of the option that lists them. If it
// returns no ports, all are open but PortSMTP.
func (c *Control) PortsFor(ctx context.Context) (open []PortRange, option string) {
	if c.Connect != nil && ctx.Value(connectKey{}) != nil {
		return c.Connect, "connect_ports"
	}
	return c.Ports, "ports"
}

// CheckPort returns why a port is closed; nil if it is open.
func (c *Control) CheckPort(ctx context.Context, port uint16) *DeniedError {
	ports, option := c.PortsFor(ctx)
	if ports == nil && port != PortSMTP || slices.ContainsFunc(ports, func(r PortRange) bool { return r.contains(port) }) {
		return nil
	}
	e := &DeniedError{Rule: option, subject: fmt.Sprintf("port %d", port), Hint: fmt.Sprintf("add %d to %s", port, option)}
	e.Allow = func() string { return portLine(option, ports, port) }
	if port == PortSMTP && ports == nil {
		e.subject = "port 25 (mail)"
		e.Hint = "list the open ports, including 25, in " + option
	}
	return e
}

// OpenPorts returns the ports that clients may connect to.
func (c *Control) OpenPorts() []PortRange {
	if c.Ports == nil {
		return append([]PortRange{{1, PortSMTP - 1}, {PortSMTP + 1, 65535}}, c.Connect...)
	}
	return slices.Concat(c.Ports, c.Connect)
}

// portLine returns the line of a Caddyfile that opens one more port. Without ports, all are open
// but PortSMTP.
func portLine(option string, ports []PortRange, port uint16) string {
	line := []byte(option)
	if ports == nil {
		return option + " 1-65535"
	}
	for _, r := range append(slices.Clip(ports), PortRange{port, port}) {
		line = append(append(line, ' '), r.String()...)
	}
	return string(line)
}
