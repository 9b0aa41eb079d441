// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// The large heads that one client's exchanges hold are limited, until the exchanges end. Small
// heads are not counted.
func TestHoldHead(t *testing.T) {
	limits := &Limits{Heads: new(HeldHeads)}
	hold := func(address string, size int) (*Exchange, error) {
		x := &Exchange{
			limits: limits, Request: &Request{LimitKey: client.Address(netip.MustParseAddr(address))},
			Response: &http.Response{Header: http.Header{"A": {strings.Repeat("a", size)}}, Body: http.NoBody},
		}
		return x, x.HoldHead()
	}
	large, err := hold("192.0.2.1", maxHeldHeads-100)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hold("192.0.2.1", largeHead); CauseOf(err) != ResponseHead {
		t.Errorf("one more large head: %v", err)
	}
	if _, err := hold("192.0.2.1", largeHead-100); err != nil {
		t.Errorf("one more small head: %v", err)
	}
	other, err := hold("192.0.2.2", largeHead)
	if err != nil {
		t.Errorf("another client: %v", err)
	}
	large.Finish()
	large.Close()
	if _, err := hold("192.0.2.1", maxHeldHeads-100); err != nil {
		t.Errorf("after the first has ended: %v", err)
	} else {
		limits.Heads.release(large.Request.LimitKey, headSize(large.Response))
	}
	other.Close()
	if n := len(limits.Heads.bytes); n > 0 {
		t.Errorf("%d clients are counted that hold nothing", n)
	}
}
