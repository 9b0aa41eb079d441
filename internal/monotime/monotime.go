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

// Time returns the time of which Of is ns.
func Time(ns int64) time.Time { return start.Add(time.Duration(ns)) }
