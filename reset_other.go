// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !windows

package asyncproxy

import (
	"errors"
	"syscall"
)

// isConnReset reports whether err says that the other end has reset the connection.
func isConnReset(err error) bool { return errors.Is(err, syscall.ECONNRESET) }
