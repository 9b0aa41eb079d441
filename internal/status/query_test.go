// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"net/url"
	"testing"
	"time"
)

// TestQueriesAreBounded checks that a query holds no more clients than it returns, and that
// it cannot ask for arbitrarily many.
func TestQueriesAreBounded(t *testing.T) {
	v := emptyView()
	for query, want := range map[string]bool{"offset=10000&limit=1000": true, "offset=10001": false, "limit=1001": false, "offset=-1": false} {
		values, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		_, clients := v.Clients(values, time.Now())
		_, tunnels := v.Tunnels(values, time.Now())
		if (clients == nil) != want || (tunnels == nil) != want {
			t.Errorf("%s: %v, %v", query, clients, tunnels)
		}
	}
}
