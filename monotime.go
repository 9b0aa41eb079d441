// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import "time"

// epoch is the start of the limiter's clock, which is monotonic.
var epoch = time.Now()

// sinceEpoch converts t to the limiter's clock. t must have a monotonic reading.
func sinceEpoch(t time.Time) int64 { return int64(t.Sub(epoch)) }
