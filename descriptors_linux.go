// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// countDescriptors returns how many descriptors are open and how many may be.
func countDescriptors() (open, limit int) {
	var most unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &most); err != nil {
		return 0, math.MaxInt32
	}
	limit = int(min(most.Cur, math.MaxInt32))
	const dir = "/proc/self/fd"
	info, err := os.Stat(dir)
	if err != nil {
		return 0, limit
	}
	if n := info.Size(); n > 0 { // since Linux 6.2
		return int(n), limit
	}
	f, err := os.Open(dir)
	if err != nil {
		return limit, limit // most likely none is left
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	return len(names), limit
}
