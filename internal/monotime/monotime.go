// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package monotime holds points in time as monotonic nanoseconds in eight bytes, which can
// be stored and changed atomically. It converts to and from time.Time. It knows nothing of
// what the times are used for.
package monotime

import "time"

// start is time zero.
var start = time.Now()

// Of returns t in nanoseconds since the start of this process. t must have a monotonic
// reading.
func Of(t time.Time) int64 { return int64(t.Sub(start)) }

// Time returns the time of which Of is ns, as the system's clock shows it now. The clock may have been
// set since the process started, or the machine suspended.
func Time(ns int64) time.Time {
	now := time.Now()
	return now.Add(time.Duration(ns - Of(now)))
}
