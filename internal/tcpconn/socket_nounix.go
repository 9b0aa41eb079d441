// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !unix

package tcpconn

import "net"

// IsQuiet returns false, because this system does not tell. Connections to origins are therefore not
// reused.
func IsQuiet(*net.TCPConn) bool { return false }
