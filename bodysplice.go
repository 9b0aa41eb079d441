// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"net/http"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
)

// spliceFrom is the smallest body that is worth splicing.
const spliceFrom = 256 << 10

// spliceBody makes the kernel move the body of a response to a client on the fast path, if both
// connections are plain sockets and the body's length is known. It returns errors.ErrUnsupported
// if the rest of the body must be copied.
//
// Off the fast path, access logs and metrics need to see the bytes, and the operator's write
// timeouts and minimum rates need to be enforced.
func spliceBody(w http.ResponseWriter, b *origin.ResponseBody, count func(n int64)) error {
	fast, ok := w.(*downstream.Writer)
	if !ok || b.IsChunked() || b.Remaining < spliceFrom {
		return errors.ErrUnsupported
	}
	if buffered := int64(b.R.Buffered()); buffered > 0 {
		if _, err := io.CopyN(fast, b, buffered); err != nil {
			return asClientError(err) // what is buffered can be read
		}
		count(buffered)
	}
	readErr, writeErr := fast.Splice(b, b.Remaining, count)
	if writeErr != nil {
		return asClientError(writeErr)
	}
	if readErr == io.EOF {
		return nil
	}
	return readErr
}
