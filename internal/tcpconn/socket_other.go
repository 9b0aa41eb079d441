// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package tcpconn

import "net"

// BytesAcked returns 0, which means unknown.
func BytesAcked(*net.TCPConn) uint64 { return 0 }

// SendState returns 0 and false, which means unknown.
func SendState(*net.TCPConn) (taken uint64, queued bool) { return 0, false }

// HasRoom returns true, because this system does not tell.
func HasRoom(*net.TCPConn) bool { return true }

// WaitWritable does not wait: the next write does.
func WaitWritable(*net.TCPConn) error { return nil }

// LimitUnsent does nothing here.
func LimitUnsent(*net.TCPConn) {}
