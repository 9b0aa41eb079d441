// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !unix

package tcpconn

import (
	"errors"
	"net"
)

// Dup is not possible here.
func Dup(*net.TCPConn) (net.Conn, error) { return nil, errors.ErrUnsupported }
