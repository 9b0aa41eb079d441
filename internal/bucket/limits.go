// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package bucket

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Bounds of the limits. Within them, no sum of times of a Table overflows an int64 of
// nanoseconds.
const (
	MinBurst, MaxBurst   = 1, 1_000_000_000
	MinRefill, MaxRefill = 0.00001, 1_000_000 // tokens per second: one a day to one a µs
	MinClients           = 2

	maxFill = 4e9 // seconds from empty to full: some 126 years
)

// Limits are the parameters of a Table. They are comparable.
type Limits struct {
	Zone       string  // name of the table
	Policy     string  // in the zone; "": the zone's own
	Burst      int64   // tokens in a full bucket
	Refill     float64 // tokens gained per second
	IPv4Prefix int     // bits of an IPv4 address that identify a client
	IPv6Prefix int     // the same of an IPv6 address
	MaxClients int     // that are tracked
}

// Validate returns an error that names the first invalid parameter.
func (l Limits) Validate() error {
	switch {
	case l.Burst < MinBurst || l.Burst > MaxBurst:
		return fmt.Errorf("burst %d: expected a number of tokens from %d to %d", l.Burst, MinBurst, MaxBurst)
	case !(l.Refill >= MinRefill && l.Refill <= MaxRefill): // also when NaN
		return fmt.Errorf("refill %v: expected tokens per second from 0.00001 (about one a day) to %d", l.Refill, MaxRefill)
	case float64(l.Burst)/l.Refill > maxFill:
		return fmt.Errorf("burst %d with refill %v: an empty bucket would take more than %.0f seconds to fill; expected a smaller burst or a larger refill",
			l.Burst, l.Refill, float64(maxFill))
	case l.IPv4Prefix < 1 || l.IPv4Prefix > 32:
		return fmt.Errorf("ipv4_prefix %d: expected bits from 1 to 32", l.IPv4Prefix)
	case l.IPv6Prefix < 1 || l.IPv6Prefix > 128:
		return fmt.Errorf("ipv6_prefix %d: expected bits from 1 to 128", l.IPv6Prefix)
	case l.MaxClients < MinClients:
		return fmt.Errorf("max_clients %d: expected a number of at least %d", l.MaxClients, MinClients)
	}
	if !ValidZone(l.Zone) {
		return fmt.Errorf("zone %q: expected a name in printable ASCII without spaces, quotes and backslashes", l.Zone)
	}
	return nil
}

// ValidZone reports whether a name needs no escaping in a RateLimit field.
func ValidZone(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(c rune) bool {
		return c <= ' ' || c > '~' || c == '"' || c == '\\'
	})
}

// Interval returns the time to gain one token.
func (l Limits) Interval() time.Duration {
	return max(1, time.Duration(math.Round(float64(time.Second)/l.Refill)))
}

// Fill returns the time from an empty bucket to a full one.
func (l Limits) Fill() time.Duration { return time.Duration(l.Burst) * l.Interval() }
