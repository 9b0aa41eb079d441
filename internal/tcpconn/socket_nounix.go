// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !unix

package tcpconn

import "net"

// IsQuiet cannot tell here. It returns false, so that connections to origins are not
// reused.
func IsQuiet(*net.TCPConn) bool { return false }
