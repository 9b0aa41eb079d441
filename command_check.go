// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// checkCommand returns `caddy async-proxy check`.
func checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check [--timeout <duration>] [--address <addr>]",
		Short: "Says whether the proxy of a running Caddy answers, for health checks",
		Long: `
Asks the admin endpoint of the Caddy that runs on this machine or in this
container for the addresses on which its proxies listen, and sends one request
to each of them. The request takes no token, reaches no handler and is not
logged. With TLS it is only a handshake.

The exit status is 0 if a proxy is running and every address answers within
--timeout, and 1 otherwise.
`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().DurationP("timeout", "t", 3*time.Second, "Time limit for all answers together")
	cmd.Flags().StringP("address", "", "", "Address of the admin endpoint, if it is not Caddy's default")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runCheck)
	return cmd
}

// runCheck runs `caddy async-proxy check`.
func runCheck(flags caddycmd.Flags) (int, error) {
	timeout := flags.Duration("timeout")
	if timeout <= 0 {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("--timeout %s: expected a positive duration such as 3s", timeout)
	}
	address, err := adminAddress(flags.String("address"))
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	found, err := fetchListeners(ctx, address)
	if err == nil && len(found.Listeners) == 0 {
		err = errNoProxy
	}
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	answers := make(chan error)
	for _, l := range found.Listeners {
		go func() { answers <- probe(ctx, l) }()
	}
	for range found.Listeners {
		err = errors.Join(err, <-answers)
	}
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	for _, l := range found.Listeners {
		fmt.Println(printable.Text(l.Address), "answers")
	}
	return caddy.ExitCodeSuccess, nil
}

// fetchListeners asks an admin endpoint where proxies listen. Caddy's function for such requests
// knows no time limit, so that its goroutine may stay behind until the process exits.
func fetchListeners(ctx context.Context, address string) (found status.Listeners, err error) {
	type answer struct {
		found status.Listeners
		err   error
	}
	fetched := make(chan answer, 1)
	go func() {
		var a answer
		a.err = fetchAdmin(address, "listeners", &a.found)
		fetched <- a
	}()
	select {
	case a := <-fetched:
		return a.found, a.err
	case <-ctx.Done():
		return found, fmt.Errorf("querying %s: no response within the time limit", address)
	}
}

// probe connects to a listener and returns why it does not answer. Without TLS, an answer is the HTTP
// response to `OPTIONS *`, which is for the server itself: net/http gives it before any handler. With
// TLS, it is the end of the handshake, which is an alert if the server asks for client certificates or
// has no certificate for our name.
func probe(ctx context.Context, l status.Listener) error {
	conn, err := new(net.Dialer).DialContext(ctx, l.Network, l.Address)
	if err != nil {
		return err // it names the address
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	if l.ProxyProtocol {
		_, _ = io.WriteString(conn, "PROXY UNKNOWN\r\n") // which the protocol has for health checks
	}
	if l.TLS {
		err = tls.Client(conn, &tls.Config{InsecureSkipVerify: true}).HandshakeContext(ctx)
		if alert := new(net.OpError); errors.As(err, &alert) && alert.Op == "remote error" {
			err = nil
		}
	} else {
		_, _ = io.WriteString(conn, "OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
		var res *http.Response
		if res, err = http.ReadResponse(bufio.NewReader(conn), nil); err == nil && res.StatusCode >= http.StatusInternalServerError {
			err = fmt.Errorf("the response is %s", printable.Text(res.Status))
		}
	}
	if err != nil {
		return fmt.Errorf("%s does not answer: %w", l.Address, err)
	}
	return nil
}
