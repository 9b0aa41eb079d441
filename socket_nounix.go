// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !unix

package asyncproxy

import "net"

// socketQuiet cannot tell here, so that no connection to an origin is used for a
// second exchange.
func socketQuiet(*net.TCPConn) bool { return false }
