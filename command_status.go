// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// watchEvery is how often --watch looks.
const watchEvery = 2 * time.Second

// statusCommand is `caddy async-proxy status`.
func statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [--watch] [--json] [--address <addr>]",
		Short: "Shows what a running proxy is doing",
		Long: `
Asks the admin endpoint of a running Caddy, and prints its counters, the clients
and the tunnels that were active last. With --watch it does so every two seconds,
on a terminal in the same place.
`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().BoolP("watch", "w", false, "Go on until interrupted")
	cmd.Flags().BoolP("json", "j", false, "Print JSON, with --watch one line each time")
	cmd.Flags().StringP("address", "", "", "Address of the admin endpoint, if it is not Caddy's default")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(flags caddycmd.Flags) (int, error) {
		address, err := caddycmd.DetermineAdminAPIAddress(flags.String("address"), nil, "", "")
		if err != nil {
			return caddy.ExitCodeFailedQuit, err
		}
		clear := flags.Bool("watch") && !flags.Bool("json") && term.IsTerminal(int(os.Stdout.Fd()))
		for {
			shown, err := fetchStatus(address)
			if err != nil {
				return caddy.ExitCodeFailedQuit, err
			}
			var out bytes.Buffer
			if flags.Bool("json") {
				_ = json.NewEncoder(&out).Encode(shown)
			} else {
				shown.print(&out)
			}
			if clear {
				// Each line is cleared behind what replaces it, so that nothing flickers.
				fmt.Printf("\x1b[H%s\x1b[J", strings.ReplaceAll(out.String(), "\n", "\x1b[K\n"))
			} else {
				_, _ = out.WriteTo(os.Stdout)
			}
			if !flags.Bool("watch") {
				return caddy.ExitCodeSuccess, nil
			}
			time.Sleep(watchEvery)
		}
	})
	return cmd
}

// shownStatus is what the command prints.
type shownStatus struct {
	Stats   stats      `json:"stats"`
	Clients clientList `json:"clients"`
	Tunnels tunnelList `json:"tunnels"`
}

func fetchStatus(address string) (*shownStatus, error) {
	s := new(shownStatus)
	for path, into := range map[string]any{
		"stats": &s.Stats, "clients?limit=10": &s.Clients, "tunnels?limit=10&sort=idle&order=asc": &s.Tunnels,
	} {
		res, err := caddycmd.AdminAPIRequest(address, http.MethodGet, "/async_proxy/"+path, nil, nil)
		if err != nil {
			return nil, fmt.Errorf("asking %s: %w; --address names another admin endpoint", address, err)
		}
		err = json.NewDecoder(res.Body).Decode(into)
		_ = res.Body.Close()
		if err != nil {
			return nil, fmt.Errorf("the answer of %s: %w", address, err)
		}
	}
	return s, nil
}

func (s *shownStatus) print(w io.Writer) {
	st := &s.Stats
	fmt.Fprintf(w, "async_proxy %s in Caddy %s, up %s, config loaded %s ago\n\n", st.Version, st.Caddy,
		age(st.Time.Sub(st.Started)), age(st.Time.Sub(st.Loaded)))
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(table, "requests\t%d forwarded\t%d tunnels\t%d passed on\n", st.Requests.Forwarded, st.Requests.Tunnels, st.Requests.PassedOn)
	fmt.Fprintf(table, "refused\t%d rate limited\t%d refused\t%d failed\n", st.Requests.RateLimited, st.Requests.Refused, st.Requests.Failed)
	fmt.Fprintf(table, "tunnels\t%s open\t%s up\t%s down\n", ofLimit(st.Tunnels.Open, st.Tunnels.Limit), size(st.BytesUp), size(st.BytesDown))
	fmt.Fprintf(table, "clients\t%s tracked\t%d evicted\t\n", ofLimit(st.Clients.Tracked, st.Clients.Limit), st.Clients.Evicted)
	_ = table.Flush()

	fmt.Fprintf(w, "\n")
	table = tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(table, "CLIENT\tTOKENS\tREQUESTS\tREJECTED\tTUNNELS\tUP\tDOWN\tSEEN\n")
	for _, c := range s.Clients.Clients {
		tokens := fmt.Sprintf("%.1f/%d", c.Tokens, c.Burst)
		if c.BlockedUntil != nil {
			tokens = "blocked " + age(c.BlockedUntil.Sub(st.Time))
		}
		fmt.Fprintf(table, "%s\t%s\t%d\t%d\t%d\t%s\t%s\t%s ago\n", c.Client, tokens, c.Requests, c.Rejections, c.Tunnels,
			size(c.BytesUp), size(c.BytesDown), age(st.Time.Sub(c.LastSeen)))
	}
	_ = table.Flush()
	more(w, s.Clients.Total-len(s.Clients.Clients), "clients")

	fmt.Fprintf(w, "\n")
	table = tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(table, "TUNNEL\tCLIENT\tTARGET\tPROTO\tAGE\tIDLE\tUP\tDOWN\n")
	for _, t := range s.Tunnels.Tunnels {
		who := t.Client
		if t.User != "" {
			who = t.User + "@" + who
		}
		fmt.Fprintf(table, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", t.ID, who, t.Target, t.Proto, age(st.Time.Sub(t.Started)),
			age(time.Duration(t.IdleSeconds*float64(time.Second))), size(t.BytesUp), size(t.BytesDown))
	}
	_ = table.Flush()
	more(w, s.Tunnels.Total-len(s.Tunnels.Tunnels), "tunnels")
}

func more(w io.Writer, n int, what string) {
	if n > 0 {
		fmt.Fprintf(w, "and %d more %s\n", n, what)
	}
}

func ofLimit(n, limit int64) string {
	if limit == 0 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d of %d", n, limit)
}

// age is a duration in one unit, or two.
func age(d time.Duration) string {
	switch d = max(0, d); {
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Hour:
		return shortDuration(d.Round(time.Second))
	case d < 48*time.Hour:
		return shortDuration(d.Round(time.Minute))
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// size is a number of bytes with a unit.
func size(n int64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/1000, 0
	for ; value >= 999.5 && unit < len(units)-1; unit++ {
		value /= 1000
	}
	if value < 9.95 {
		return fmt.Sprintf("%.1f %cB", value, units[unit])
	}
	return fmt.Sprintf("%.0f %cB", value, units[unit])
}
