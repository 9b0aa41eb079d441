// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build race

package asyncproxy

// raceEnabled says that the tests run under the race detector, which takes
// several times the time and memory.
const raceEnabled = true
