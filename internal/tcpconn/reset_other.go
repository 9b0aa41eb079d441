// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !windows

package tcpconn

import (
	"errors"
	"syscall"
)

// IsReset reports whether err says that the other end has reset the connection.
func IsReset(err error) bool { return errors.Is(err, syscall.ECONNRESET) }
