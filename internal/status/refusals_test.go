// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"testing"
)

func TestLastRefusals(t *testing.T) {
	var r refusalRing
	for n := range 250 {
		list := r.list()
		if len(list) != min(n, 100) {
			t.Fatalf("after %d refusals %d are kept", n, len(list))
		}
		for i, info := range list {
			if info.Status != n-1-i {
				t.Fatalf("after %d refusals, number %d is %d", n, i, info.Status)
			}
		}
		r.add(&Refusal{Status: n})
	}
}
