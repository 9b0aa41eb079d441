// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package tcpconn

import (
	"errors"
	"net"
)

// Splicer moves nothing here: the caller copies.
type Splicer struct{}

// NewSplicer returns a Splicer whose Fill fails.
func NewSplicer(dst, src *net.TCPConn) *Splicer { return &Splicer{} }

// Fill returns errors.ErrUnsupported.
func (*Splicer) Fill(int64) (int, error) { return 0, errors.ErrUnsupported }

// TryFill returns errors.ErrUnsupported.
func (*Splicer) TryFill(int64) (int, error) { return 0, errors.ErrUnsupported }

// Drain does nothing.
func (*Splicer) Drain(func(n int)) error { return nil }

// TryDrain does nothing.
func (*Splicer) TryDrain(func(n int)) (empty bool, err error) { return true, nil }

// Close does nothing.
func (*Splicer) Close() {}

// ClosePipes does nothing: there are no pipes here.
func ClosePipes() {}
