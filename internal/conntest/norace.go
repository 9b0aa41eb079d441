// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !race

package conntest

// Race reports that the race detector is on. It multiplies time and memory.
const Race = false
