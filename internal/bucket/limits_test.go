// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package bucket

import (
	"math"
	"testing"
)

func TestValidate(t *testing.T) {
	const good = "" // no error
	for _, tc := range []struct {
		name   string
		change func(*Limits)
		want   string
	}{
		{"defaults", func(k *Limits) {}, good},
		{"least burst", func(k *Limits) { k.Burst = 1 }, good},
		{"greatest burst", func(k *Limits) { k.Burst = 1e9 }, good},
		{"no burst", func(k *Limits) { k.Burst = 0 }, "burst 0: expected a number of tokens from 1 to 1000000000"},
		{"negative burst", func(k *Limits) { k.Burst = -1 }, "burst -1: expected a number of tokens from 1 to 1000000000"},
		{"burst too great", func(k *Limits) { k.Burst = 1e9 + 1 }, "burst 1000000001: expected a number of tokens from 1 to 1000000000"},

		{"least refill", func(k *Limits) { k.Refill = 0.00001 }, good},
		{"greatest refill", func(k *Limits) { k.Refill = 1e6 }, good},
		{"no refill", func(k *Limits) { k.Refill = 0 }, "refill 0: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"negative refill", func(k *Limits) { k.Refill = -0.5 }, "refill -0.5: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"refill too small", func(k *Limits) { k.Refill = 0.0000099 }, "refill 9.9e-06: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"refill too great", func(k *Limits) { k.Refill = 1e6 + 1 }, "refill 1.000001e+06: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"refill NaN", func(k *Limits) { k.Refill = math.NaN() }, "refill NaN: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"refill infinite", func(k *Limits) { k.Refill = math.Inf(1) }, "refill +Inf: expected tokens per second from 0.00001 (about one a day) to 1000000"},

		{"longest fill", func(k *Limits) { k.Burst, k.Refill = 1e9, 0.25 }, good},
		{"fill too long", func(k *Limits) { k.Burst, k.Refill = 1e9, 0.24 },
			"burst 1000000000 with refill 0.24: an empty bucket would take more than 4000000000 seconds to fill; expected a smaller burst or a larger refill"},

		{"ipv4_prefix 1", func(k *Limits) { k.IPv4Prefix = 1 }, good},
		{"ipv4_prefix 0", func(k *Limits) { k.IPv4Prefix = 0 }, "ipv4_prefix 0: expected bits from 1 to 32"},
		{"ipv4_prefix 33", func(k *Limits) { k.IPv4Prefix = 33 }, "ipv4_prefix 33: expected bits from 1 to 32"},
		{"ipv6_prefix 128", func(k *Limits) { k.IPv6Prefix = 128 }, good},
		{"ipv6_prefix 0", func(k *Limits) { k.IPv6Prefix = 0 }, "ipv6_prefix 0: expected bits from 1 to 128"},
		{"ipv6_prefix 129", func(k *Limits) { k.IPv6Prefix = 129 }, "ipv6_prefix 129: expected bits from 1 to 128"},

		{"max_clients 2", func(k *Limits) { k.MaxClients = 2 }, good},
		{"max_clients 1", func(k *Limits) { k.MaxClients = 1 }, "max_clients 1: expected a number of at least 2"},

		{"zone", func(k *Limits) { k.Zone = "office-2" }, good},
		{"no zone", func(k *Limits) { k.Zone = "" }, `zone "": expected a name in printable ASCII without spaces, quotes and backslashes`},
		{"zone with a quote", func(k *Limits) { k.Zone = `a"b` }, `zone "a\"b": expected a name in printable ASCII without spaces, quotes and backslashes`},
		{"zone with a line end", func(k *Limits) { k.Zone = "a\nb" }, `zone "a\nb": expected a name in printable ASCII without spaces, quotes and backslashes`},
		{"zone beyond ASCII", func(k *Limits) { k.Zone = "büro" }, `zone "büro": expected a name in printable ASCII without spaces, quotes and backslashes`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			lim := limits(10, 0.5)
			tc.change(&lim)
			var got string
			if err := lim.Validate(); err != nil {
				got = err.Error()
			}
			if got != tc.want {
				t.Errorf("Validate() = %q, want %q", got, tc.want)
			}
		})
	}
}
