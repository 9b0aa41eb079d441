// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"errors"
	"syscall"
)

// IsReset reports whether err says that the other end has reset the connection. Sockets of
// Windows return its own numbers. syscall.ECONNRESET is a number that Go invented, which only
// the proxy's own errors have.
func IsReset(err error) bool {
	return errors.Is(err, syscall.WSAECONNRESET) || errors.Is(err, syscall.WSAECONNABORTED) || errors.Is(err, syscall.ECONNRESET)
}
