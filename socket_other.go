// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import "net"

// bytesAcked returns 0, which means unknown.
func bytesAcked(*net.TCPConn) uint64 { return 0 }

// sendState returns 0 and false, which means unknown.
func sendState(*net.TCPConn) (taken uint64, queued bool) { return 0, false }

// hasRoom returns true, since it cannot tell.
func hasRoom(*net.TCPConn) bool { return true }

// waitWritable does not wait: the next write does.
func waitWritable(*net.TCPConn) error { return nil }

// limitUnsent does nothing here.
func limitUnsent(*net.TCPConn) {}
