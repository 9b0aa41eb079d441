// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"testing"
)

func TestMaskClient(t *testing.T) {
	for name, want := range map[string]string{
		"192.0.2.77": "192.0.2.0/24",
		"user alice": "user",
		"":           "",
	} {
		if got := maskClient(name); got != want {
			t.Errorf("maskClient(%q) = %q, want %q", name, got, want)
		}
	}
}
