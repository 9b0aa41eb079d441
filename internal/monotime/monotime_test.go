// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package monotime

import (
	"testing"
	"time"
	"unsafe"
)

// TestTimeAfterTheClockWasSet checks that what happens after the clock was set has the time that the clock
// shows, and that a time is the same again.
func TestTimeAfterTheClockWasSet(t *testing.T) {
	real := start
	defer func() { start = real }()
	// The seconds of the wall clock are above 30 bits of nanoseconds.
	*(*uint64)(unsafe.Pointer(&start)) -= 7200 << 30
	if set := real.Round(0).Sub(start.Round(0)); set != 2*time.Hour || real.Sub(start) != 0 {
		t.Fatalf("the clock was set by %v", set)
	}
	now := time.Now()
	if got := Time(Of(now)); !got.Equal(now) || now.Round(0).Sub(got.Round(0)).Abs() > time.Hour {
		t.Errorf("%v, want %v", got, now)
	}
	if ns := Of(now); Of(Time(ns)) != ns {
		t.Error("the time changes")
	}
}
